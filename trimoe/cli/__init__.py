"""The command line. Exit code 0: done; 2: the user's mistake, one sentence; 130: stopped by Ctrl-C; 143: by SIGTERM; 1: anything else."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from trimoe.cli import judge, look, make, show
from trimoe.cli.garbage import uncollected

INTERRUPTED = 130  # what typer exits with after Ctrl-C

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, help="Make Mixture-of-Experts models smaller.")
app.command()(look.inspect)
app.command()(look.plan)
app.command()(make.stats)
app.command()(make.compress)
app.command()(make.sweep)
app.command()(make.recover)
app.command(name="eval")(judge.evaluate)
app.command()(look.bench)
app.command()(show.report)
app.command()(show.push)
app.command()(make.demo)
app.command()(look.recipes)


def main() -> None:
    """Entry point: turns a user's mistake into one sentence on standard error and exit code 2."""
    if _words_only():
        app()
    with _ended_at_once(), uncollected():
        from transformers import PreTrainedModel  # noqa: F401 (what takes long to load, before anything begins)
        from transformers.utils import logging

        from trimoe import team
        from trimoe.errors import TERMINATED, UserError

    logging.set_verbosity_error()  # this process is ours: warnings about configurations are not the user's business here
    if not team.speaks():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    if not team.launched():  # torchrun's processes are ended by torchrun
        signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except UserError as mistake:
        if not isinstance(mistake, team.Elsewhere):
            print(f"trimoe: {mistake}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED) and team.speaks():
            goes_on = sys.argv[1:2] and sys.argv[1] in ("compress", "sweep", "recover")
            print("trimoe: stopped." + (" The same command goes on where this one was." if goes_on else ""), file=sys.stderr)
        raise
    except OSError as failure:
        print(f"trimoe: {_said(failure)}", file=sys.stderr)
        sys.exit(1)


def _words_only() -> bool:
    """Whether only help or a completion is wanted, for which nobody should wait seconds for torch."""
    return "_TRIMOE_COMPLETE" in os.environ or not sys.argv[1:] or sys.argv[-1] in ("--help", "--show-completion", "--install-completion")


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """While the libraries load, Ctrl-C ends the process as it does any other: an import that is interrupted may make another error of it,
    or go on. Nothing has begun yet."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it is ignored, or somebody's else
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, _: Any) -> None:
    """What is temporary goes, and the log says so. Told again meanwhile, the process ends at once: whatever is on the disk by then is whole."""
    from trimoe.errors import TERMINATED

    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def _said(failure: OSError) -> str:
    """What the disk did not do, in a sentence; what else is an OSError (a connection, a library's own) says it itself."""
    if failure.strerror is None or failure.filename is None:
        return str(failure)
    return f"{failure.filename} could not be read or written: {failure.strerror}. Run the same command again once that is mended."
