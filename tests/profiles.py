"""Hypothesis profiles: `make test` draws the same examples on every run, `make fuzz` draws new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.internal.conjecture import providers

FUZZ_TIMES = int(os.environ.get("FUZZ_TIMES", "10"))
_DEFAULT = settings().max_examples

# Neither a deadline nor `too_slow`, which measure time: machines differ, are loaded, and the first call imports.
settings.register_profile(
    "test",
    derandomize=True,
    database=None,
    max_examples=_DEFAULT,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz",
    settings.get_profile("test"),
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    max_examples=_DEFAULT * FUZZ_TIMES,
)
settings.load_profile("test")  # the option `--hypothesis-profile` can replace it


def examples(count: int) -> int:
    """The `max_examples` of a test that gets `count` of them in `make test`, and FUZZ_TIMES as many in `make fuzz`."""
    return count * settings().max_examples // _DEFAULT


# Hypothesis also draws constants that it finds in those modules of the project that are imported. Which are imported
# depends on the tests that ran before in this process, so pytest-xdist would decide what is drawn.
_found = providers._get_local_constants
_none = providers.Constants()
providers._get_local_constants = lambda: _none if settings().derandomize else _found()
