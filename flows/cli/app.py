"""The Typer application, its entry point, and how errors end a command."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import select
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from flows.cli.output import LOGGERS, Output
from ixi_etl import __version__
from ixi_etl.core.signals import end_on_signals
from ixi_etl.errors import ConfigError, IxiError, StoppedError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

COMMANDS = {
    "datasets": ("survey", "check-official", "refresh", "digits"),
    "demo": ("demo", "simulate"),
    "evaluations": ("evaluate",),
    "runs": ("train", "synthesize", "export"),
    "sharing": ("card", "push"),
    "versions": ("verify", "versions", "export-dataset", "prune", "reproduce"),
}
"""Module of `flows.cli` -> the commands that it adds to `app`."""

Root = Annotated[
    str, typer.Option("--root", envvar="IXI_ROOT", help="Folder or s3://bucket/prefix that holds datasets and runs.")
]
Scratch = Annotated[
    Path | None,
    typer.Option(envvar="IXI_SCRATCH", help="If the root is on S3: folder for archives and unfinished work."),
]
DEFAULT_ROOT = "ixi-data"
VERSION_HELP = "[NAME@]VERSION, a unique prefix of a version, or latest; NAME is ixi-t1-t2 or digits"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ixi-etl {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn the IXI brain MRI archives into a verified, versioned, paired T1/T2 dataset, and train pix2pix on it."""


def import_commands(name: str = "") -> None:
    """Import the module of the command `name`; all modules if there is no such command, as for `--help`."""
    modules = [module for module, names in COMMANDS.items() if name in names]
    for module in modules or COMMANDS:
        import_module(f"flows.cli.{module}")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. A user-correctable error stops it with a one-line message and its class's exit code."""
    if arguments is None:  # in a process of its own
        end_on_signals()
        _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # print file names that are not UTF-8 byte by byte
    atexit.register(gc.freeze)  # otherwise Python collects garbage once more at exit: 0.2 s with pandas in memory
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers, logger.propagate = [handler], False
    streams = sys.stdout, sys.stderr
    status = _run(arguments)
    try:
        sys.stdout.flush()
        if (sys.stdout, sys.stderr) != streams:  # Typer treats every broken pipe as a closed output
            sys.stdout, sys.stderr = streams
            sys.stdout.flush()
            if _has_reader(sys.stdout):
                typer.echo("error: a connection broke (broken pipe); run the same command again", err=True)
    except BrokenPipeError:  # as in `| head -1`: no error, and Python must not try to flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        typer.echo(f"error: cannot write the result: {error.strerror or error}", err=True)
        status = 1
    sys.exit(status)


def _has_reader(stream: TextIO) -> bool:
    """Whether the other end of a pipe or socket is open; True for other streams.

    After a failed write nothing may be left to flush, so a flush cannot tell. A connection of the command that broke
    while nobody read its output is not reported.
    """
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # not a file
        return True
    poll = select.poll()
    poll.register(descriptor, 0)  # these two are reported anyway
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run(arguments: list[str] | None) -> int:
    """Run the command; the exit status."""
    from pydantic import ValidationError

    Output.current = None
    given = sys.argv[1:] if arguments is None else arguments
    try:
        import_commands(next((argument for argument in given if not argument.startswith("-")), ""))
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except StoppedError as error:
        return _fail(str(error), error.exit_code, "")
    except IxiError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        with suppress(OSError):
            sys.stdout.flush()  # fails again if stdout is what failed; `main` reports that
            return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except ValidationError as error:
        from ixi_etl.config import format_validation_error

        return _fail(format_validation_error(error), ConfigError.exit_code)
    return 1


def _fail(message: str, status: int = 1, label: str = "error: ") -> int:
    """Print the error on stderr, and add it to the JSON object if `--json` was given; the exit status."""
    typer.echo(label + message, err=True)
    if Output.current is not None:
        with suppress(OSError):  # stdout may be what failed; stderr and the status still report the error
            Output.current.fail(message)
    return status


def _open_missing_streams() -> None:
    """Open /dev/null for standard streams that a daemon closed (`>&-`): Python has None in their place."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
