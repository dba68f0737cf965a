"""Run the property tests once for each seed with many more examples, and list the failures: `make fuzz`.

A failure does not stop the search. The summary lists the failed tests, their seeds, and the command that repeats each.
Hypothesis keeps failing examples in `.hypothesis/`, and the next run tries them first.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

TOP = Path(__file__).parent.parent
NO_TEST = 5  # pytest's exit code if no test was collected


def run_seed(seed: int, only: str, more: list[str]) -> tuple[int, list[str], str]:
    """Run pytest with a seed: its exit code, the failed tests, and its output."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        marks = "hypothesis and not real and not standin and not stack and not images and not faults and not bench"
        command = [sys.executable, "-m", "pytest", "-m", marks, "-k", only, "-q"]
        command += ["--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", f"--junitxml={results}", *more]
        done = subprocess.run(
            command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        cases = ElementTree.parse(results).iter("testcase") if results.exists() else ()
        failed = [str(c.get("name")) for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return done.returncode, failed, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds to draw")
    parser.add_argument("--seed", type=int, nargs="*", default=[], help="use these seeds instead")
    parser.add_argument("--only", default="", help="the tests to run, as for pytest -k")
    chosen, more = parser.parse_known_args()
    seeds = chosen.seed or [random.SystemRandom().randrange(1 << 32) for _ in range(chosen.seeds)]
    found: dict[str, list[int]] = {}
    broken = []
    for number, seed in enumerate(seeds, 1):
        code, failed, output = run_seed(seed, chosen.only, more)
        if code == NO_TEST:
            print(output)
            return code
        if code and not failed:
            broken.append(seed)
        if code and (not failed or not found.keys() >= set(failed)):  # a test fails for the first time
            print(output)
        for name in failed:
            found.setdefault(name, []).append(seed)
        lines = output.strip().splitlines()  # none if a signal ended pytest early
        last = lines[-1] if lines else f"no output, exit code {code}"
        print(f"seed {seed} ({number} of {len(seeds)}): {last}", flush=True)
    for name, failing in found.items():
        command = f"make fuzz SEED={failing[0]} ONLY={name.split('[')[0]}"
        print(f"{name} failed with {', '.join(map(str, failing))}; to repeat: {command}")
    for seed in broken:
        print(f"pytest ended early with {seed}; to repeat: make fuzz SEED={seed}")
    if not found and not broken:
        print(f"no test failed with any of {len(seeds)} seeds")
    return 1 if found or broken else 0


if __name__ == "__main__":
    sys.exit(main())
