"""The Prefect flows, and the command line."""

import os
import sys
from importlib import import_module
from pathlib import Path

os.environ.setdefault("DO_NOT_TRACK", "1")  # no usage statistics, and no notice about them on the first run

_TOP = Path(__file__).resolve().parent.parent


def _import_siblings() -> None:
    """Import this project's `model` and `ixi_etl` before the working directory can hide them.

    `python -m` and PYTHONPATH put folders in front of the installed packages, so a user's own `model.py` would be
    imported instead. Once imported, a package keeps its name.
    """
    sys.path.insert(0, str(_TOP))
    try:
        for name in ("ixi_etl", "model"):
            found = import_module(name).__file__ or "a folder without __init__.py"
            if Path(found).resolve().parent.parent != _TOP:
                raise ImportError(
                    f"{found} was imported as `{name}`, which hides ixi-etl's own; rename it, or import `flows` first"
                )
    finally:
        sys.path.remove(str(_TOP))


_import_siblings()
