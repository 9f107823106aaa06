"""Whether a finished folder is still what was written there."""

from __future__ import annotations

from pathlib import Path

from trimoe.checkpoint.folder import Checkpoint
from trimoe.checkpoint.headers import read_header
from trimoe.errors import UserError

PAGE = "report.html"  # what trimoe report puts into it


def lost(out: Path, source: Checkpoint) -> str | None:
    """What is wrong by now with the model folder `out`, made from `source`: weights, configuration, or a file that was carried over."""
    try:
        Checkpoint.open(out)
    except UserError as reason:
        return str(reason)
    return _missing(out, source.side_files())


def lost_adapter(out: Path, names: tuple[str, ...]) -> str | None:
    """The same of an adapter's folder, which has the files `names`."""
    try:
        for name in names:
            if name.endswith(".safetensors") and (out / name).is_file():
                read_header(out / name)
    except UserError as reason:
        return str(reason)
    return _missing(out, names)


def refuse_lost(out: Path, reason: str | None) -> None:
    """Raises UserError where there is a reason."""
    if reason is not None:
        raise UserError(f"{out} was finished and is no longer whole: {reason} Put that right, or delete the folder to make it again.")


def _missing(out: Path, names: list[str] | tuple[str, ...]) -> str | None:
    gone = [name for name in names if not (out / name).is_file()]
    return f"it has no {gone[0]}." if gone else None
