"""The Prefect flows, and the command line."""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")  # Prefect prints a notice on a first run, and reports that there was one
