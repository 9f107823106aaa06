"""Files that are either whole or not there: written aside, flushed to the disk, renamed. A disk that fails is an OSError that names the file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trimoe.errors import UserError


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """The path to write to; it becomes `path` at the end, and stays as it is where writing fails."""
    part = path.with_name(path.name + ".part")
    with disk_errors(path):
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What Python, safetensors and torch raise when a file cannot be written, as one kind of error."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(f"{path} could not be written; is the disk full?") from error


def refuse_odd(out: Path, what: str = "The output") -> None:
    """Raises UserError for a name under which nothing can be made: that of standard output, one that is too long, and a link to nothing,
    be it the last of the path's names or one before it."""
    if str(out) == "-":
        raise UserError(f"{what} - would be a file or folder of that name, not standard output; give another name.")
    try:
        for place in (out, *out.parents):
            if place.is_symlink() and not place.exists():
                raise UserError(f"{what} {out} cannot be made: {place} is a link to {place.readlink()}, which does not exist.")
            place.exists()
    except OSError as error:
        raise UserError(f"{what} {str(out)[:200]} cannot be made: {error.strerror}.") from None


def write_text(path: Path, text: str) -> None:
    with aside(path) as part:
        part.write_bytes(text.encode())


def copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with aside(target) as part:
        shutil.copyfile(source, part)
