"""What a user did wrong, said in one sentence. The command line prints it and exits with 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What an architecture's own code raises on numbers that it was not made for; kernels that are not there are RuntimeErrors, too.
FOREIGN = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, ArithmeticError)

TERMINATED = 143  # the exit code after SIGTERM, which a queue or a container sends first


class UserError(ValueError):
    """A mistake in the input: what was given, where, and what is allowed."""


class Diverged(UserError):
    """Training left the numbers: the rate is too high."""


def stop_if_told(error: BaseException) -> None:
    """Re-raises Ctrl-C or SIGTERM where `error` came of it: a library's tidying up may fail while it is being stopped, and raise its own.
    Called wherever anything that foreign code raises is made a sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt) or (isinstance(cause, SystemExit) and cause.code == TERMINATED):
            raise cause from None
        cause = cause.__context__


def first_line(error: BaseException) -> str:
    """What an exception of someone else's code says, as it can stand in a sentence of ours: its first line (and the next, where that only
    announces it), cut."""
    said = [line.strip() for line in str(error).strip().splitlines()]
    if len(said) > 1 and said[0].endswith(":"):
        said[0] += f" {said[1]}"
    return said[0][:160] if said else type(error).__name__


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While fields of a file of ours are used: that they are not there, or of another kind, is its reader's mistake, not ours."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} does not read as trimoe writes it: it has no {error.args[0]!r} where one is expected.") from error
    except (TypeError, AttributeError, IndexError, ValueError, StopIteration, ZeroDivisionError) as error:
        raise UserError(f"{path} does not read as trimoe writes it: a field holds something of another kind than is expected.") from error
