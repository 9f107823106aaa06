"""Whether the disk has room: sizes of folders, free space, and whether a file can be made at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from trimoe.errors import UserError
from trimoe.show.format import human


def check(out: Path, wanted: int, spill: int = 0, *, left: int | None = None) -> None:
    """Raises UserError where the disk of `out` has no room for `wanted` bytes, or that of temporary files none for `spill`.

    Of what is wanted `left` bytes are there already; by default what a killed run left in `out`.
    """
    existing = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    there = size(out) if left is None else left
    scratch = Path(tempfile.gettempdir())
    if spill and os.stat(scratch).st_dev == os.stat(existing).st_dev:
        wanted, spill = wanted + spill, 0
    for place, need, have in ((existing, wanted, there), (scratch, spill, 0)):
        free = shutil.disk_usage(place).free + have
        if need and free < need:
            what = "The result needs" if place == existing else "Hidden states that do not fit in memory need"
            hint = "" if place == existing else "; set TMPDIR to a folder on a larger disk, or take fewer calibration tokens"
            raise UserError(f"{what} {human(need)} of disk at {place}, which has {human(free)} free{hint}.")


def size(folder: Path) -> int:
    """Bytes of all files in a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def probe(path: Path, option: str) -> None:
    """Raises UserError where no file can be made in the folder of `path`: found out before hours of work, not after."""
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}.") from None
