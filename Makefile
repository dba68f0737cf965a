# `make demo` and `make test` install what they need into .venv first; `make help` lists all targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BASE   := $(VENV)/.installed-base
TRAIN  := $(VENV)/.installed-train
STAMP  := $(VENV)/.installed
TOOLS  := $(VENV)/.installed-tools

export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE # otherwise each process compiles all modules again

.PHONY: demo real test fuzz test-real test-standin test-stack faults audit bench bench-check protocols api docs lock images dist deploy lint clean help

help:
	@echo "make demo          run the whole pipeline on a small simulated IXI; needs no server and no account"
	@echo "make real          run the whole pipeline on the official archives (8.1 GiB), and write real-report.tar.gz; SOURCE=folder: use these archives"
	@echo "make test          run the tests (3 minutes) with the same random examples on every run"
	@echo "make fuzz          search for failing random examples; SEEDS=30: thirty seeds, SEED=N: one seed, ONLY=name: one test"
	@echo "make test-real     run the tests on real scans, if present (2 minutes)"
	@echo "make test-standin  run the tests on simulated archives of real anatomy, if present (minutes)"
	@echo "make test-stack    run PostgreSQL, Prefect, workers, Dask and S3 as processes and test them, the wheel and the images (12 minutes)"
	@echo "make images        build both images with buildah, as root on Debian, and run them; make test-stack does it too (3 minutes)"
	@echo "make faults        test kills, bad servers, full disks and hostile files, in all variants (15 minutes); ONLY=name: some"
	@echo "make audit         run bandit, and pip-audit if its advisories can be reached"
	@echo "make bench         compare the speed with that of other tools; ONLY=survey,refresh: some rows, QUICK=1: a trial run, ARCHIVES=folder: refreshes of these too"
	@echo "make bench-check   measure some rows again; fail if one lost a third of its last recorded ratio on such a machine (17 minutes)"
	@echo "make protocols     measure on simulated archives how many dB a protocol is worth (8 minutes); OUT=folder, QUICK=1: a trial run"
	@echo "make api           write docs/api.md from the docstrings"
	@echo "make docs          build the website in site/ (2 minutes), with a live example; opens from disk"
	@echo "make lock          write requirements/ and constraints.txt from pyproject.toml; UPGRADE=name: take this package's newest version"
	@echo "make dist          build the wheel and the source distribution in dist/"
	@echo "make deploy        create pools, deployments, automations and notifications on the Prefect server at PREFECT_API_URL"
	@echo "make lint          run ruff and mypy"
	@echo "make clean         remove the environment, and the files of the demo, of make protocols, docs and dist"

# Each stamp records which set of packages is installed. They are reinstalled when one of these files changes; the last
# one holds the version.
$(BASE): SET := base
$(TRAIN): SET := train
$(STAMP): SET := test
$(TOOLS): SET := tools
$(TOOLS): $(STAMP)
$(BASE) $(TRAIN) $(STAMP) $(TOOLS): pyproject.toml $(wildcard requirements/*.txt) requirements/install.py ixi_etl/__init__.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes on the first call)"
	@$(BIN)/python requirements/install.py $(SET)
	@touch $@

# If the environment with all extras exists, it is used.
demo: $(or $(wildcard $(STAMP)),$(TRAIN))
	@$(BIN)/ixi-etl demo

# SOURCE=folder uses archives that are there already, and the IXI.xls beside them. The report has no voxels and no
# pictures. A published fact that differs is a result too, so a failure of check-official does not end the recipe.
real: FROM = $(if $(SOURCE),--source "$(SOURCE)") --demographics "$(or $(wildcard $(SOURCE)/IXI.xls),official)"
real: $(or $(wildcard $(STAMP)),$(TRAIN))
	@$(BIN)/ixi-etl refresh --root ixi-data $(FROM)
	@rm -rf real-report && mkdir real-report
	@$(BIN)/ixi-etl check-official --root ixi-data $(FROM) --json > real-report/check-official.json || true
	@cd "$$($(BIN)/python -c 'from ixi_etl.dataset.versions import find_version as f; print(f("ixi-data", "latest"))')" && \
		cp manifest.csv dataset.json software.json "$(CURDIR)/real-report"
	@$(BIN)/ixi-etl train --root ixi-data --preset smoke --resume --json > real-report/train.json
	@tar -czf real-report.tar.gz real-report
	@echo "please send real-report.tar.gz to the project: tables and settings, no images"

test: $(STAMP)
	@$(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not real and not standin and not stack and not images and not faults and not bench"

fuzz: $(STAMP)
	@$(BIN)/python tests/fuzz.py --seeds "$(or $(SEEDS),10)" --seed $(SEED) --only "$(ONLY)"

test-real: $(STAMP)
	@$(BIN)/pytest -m real

test-standin: $(STAMP)
	@$(BIN)/pytest -m standin

test-stack: $(STAMP)
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null || { echo "PostgreSQL is missing; apt-get install postgresql"; exit 1; }
	@$(BIN)/pytest -m "stack or images" -n 3 --dist loadgroup --no-loadscope-reorder -o faulthandler_timeout=900

images: $(STAMP)
	@$(BIN)/pytest -m images

faults: $(STAMP)
	@$(BIN)/pytest -m faults -n 2 --dist worksteal -o faulthandler_timeout=900 -l $(if $(ONLY),-k "$(ONLY)")

audit: $(TOOLS)
	@$(BIN)/bandit --quiet --recursive --configfile pyproject.toml ixi_etl model flows
	@echo "bandit found nothing in ixi_etl, model and flows"
	@$(BIN)/python .ci/advisories.py

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.run --only "$(ONLY)" $(if $(QUICK),--quick) $(if $(ARCHIVES),--archives "$(ARCHIVES)") $(if $(OUT),--out "$(OUT)")

bench-check: $(STAMP)
	@$(BIN)/pytest -m bench -o faulthandler_timeout=1800

protocols: $(or $(wildcard $(STAMP)),$(TRAIN))
	@$(BIN)/python -m benchmarks.protocols --out "$(or $(OUT),protocols)" $(if $(QUICK),--quick)

api: $(STAMP)
	@$(BIN)/python tests/api_page.py

# The live example of the website: simulated archives, a version of them, and a training run, by this code.
EXAMPLE := build/example/.made
$(EXAMPLE): export PREFECT_API_URL :=
$(EXAMPLE): $(STAMP) $(shell find flows ixi_etl model -name '*.py' -o -path '*/templates/*')
	@rm -rf build/example
	@$(BIN)/ixi-etl simulate build/example/archives --subjects 6 --oddities --quiet > /dev/null
	@$(BIN)/ixi-etl refresh --root build/example/ixi-data --source build/example/archives --split-seed 6 --quiet > /dev/null
	@$(BIN)/ixi-etl train --root build/example/ixi-data --preset smoke --steps 200 --quiet > /dev/null
	@touch $@

# mkdocs.yml is strict, so a warning is an error: a broken link or anchor, a page that the navigation does not list.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(TOOLS) $(EXAMPLE)
	@$(BIN)/mkdocs build
	@echo "open site/index.html"

# Locked versions stay, except those that UPGRADE names. The tool that it needs goes into an environment of its own.
lock:
	@$(PYTHON) requirements/lock.py $(UPGRADE)

dist: $(STAMP)
	@rm -rf dist
	@$(BIN)/python -m build

deploy: $(or $(wildcard $(STAMP) $(TRAIN)),$(BASE))
	@$(BIN)/python -m flows.deploy

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) demo protocols build site dist
