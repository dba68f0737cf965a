# The project with the versions and hashes in requirements/.
#   docker build --target cpu -t ixi-etl:cpu .   Prefect server, deploying, refreshing, cutting: no torch
#   docker build --target gpu -t ixi-etl:gpu .   training, with PyTorch's CUDA build, which also runs without a GPU
# `make images` builds both without Docker, and tests them; the gpu image was tested with PyTorch's CPU build only.

FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS cpu
RUN useradd --uid 1000 --create-home ixi && install --directory --owner ixi --group ixi /data /prefect
WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip python requirements/install.py base
# The root file system may be read-only: everything is written to /data, /prefect or /tmp.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib \
    PREFECT_HOME=/tmp/prefect PREFECT_PLUGINS_ENABLED=1
# The commit recorded in software.json of a version and config.json of a run; the image has no .git.
ARG IXI_COMMIT=
ENV IXI_COMMIT=$IXI_COMMIT
USER ixi

FROM cpu AS gpu
USER root
RUN --mount=type=cache,target=/root/.cache/pip python requirements/install.py train
USER ixi
