"""`python -m flows` is `ixi-etl`."""

from flows.cli import main

main()
