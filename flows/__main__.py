"""`python -m flows` is `ixi-etl`. In a folder with a `flows` of its own it is that one: `python -m ixi_etl` is not."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # no trace of what is being imported; `main` has a handler of its own

from flows.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
