"""`ixi-etl` and `python -m ixi_etl`: the command line, even in a folder that has a `flows` or a `model` of its own.

The command line is in `flows`, a name that users have too; it is imported from beside this package, by name at run
time, as nothing here depends on it.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> Any:
    """Run the command line of the `flows` that belongs to this package."""
    top = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, top)
    try:
        command_line = import_module("flows.__main__")
    finally:
        sys.path.remove(top)
    return command_line.main()


if __name__ == "__main__":
    main()
