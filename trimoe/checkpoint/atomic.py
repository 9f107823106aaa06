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


def refuse_dangling(out: Path) -> None:
    """Raises UserError where the folder to be made, or one that it would lie in, is a link to nothing: no folder can be made there."""
    for place in (out, *out.parents):
        if place.is_symlink() and not place.exists():
            raise UserError(f"The output {out} cannot be made: {place} is a link to {place.readlink()}, which does not exist.")


def write_text(path: Path, text: str) -> None:
    with aside(path) as part:
        part.write_bytes(text.encode())


def copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with aside(target) as part:
        shutil.copyfile(source, part)
