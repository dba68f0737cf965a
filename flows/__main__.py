"""Run `ixi-etl` as `python -m flows`. If the current folder has its own `flows`, use `python -m ixi_etl`."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of what is being imported; `main` has a handler of its own

from flows.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
