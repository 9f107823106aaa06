"""What was measured before, so that it is not measured again: one small JSON file a result, in `~/.cache/trimoe/eval` or `$TRIMOE_CACHE`.

A result is found by everything that it depends on: fingerprints of the models with the sizes and times of their files, what was asked,
precision, this code itself and the libraries under it. Writers may be many: a file is written aside and renamed, and what cannot be read is
measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from trimoe.checkpoint.folder import Checkpoint
from trimoe.version import versions


def default_folder() -> Path | None:
    """None, and so nothing is kept, for users without a home (in containers)."""
    given = os.environ.get("TRIMOE_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "trimoe" / "eval"
    except RuntimeError:
        return None


def digest(parts: Iterable[bytes]) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.hexdigest()[:32]


@cache
def code() -> str:
    """Of every source file of this package: another trimoe may measure something else."""
    root = Path(__file__).parents[1]
    return digest(path.read_bytes() for path in sorted(root.rglob("*.py")))


def identity(checkpoint: Checkpoint) -> str:
    """Of a model and its tokenizer. The fingerprint reads samples of large shards; one that was written again has another time."""
    stats = [(checkpoint.folder / file).stat() for file in checkpoint.files()]
    shards = json.dumps([[stat.st_size, stat.st_mtime_ns] for stat in stats])
    return digest(
        [checkpoint.fingerprint.encode(), shards.encode(), *((checkpoint.folder / name).read_bytes() for name in checkpoint.side_files())]
    )


class ResultCache:
    """Results by what they depend on. Without a folder nothing is kept. `taken` counts what was found."""

    def __init__(self, folder: Path | None):
        self.folder, self.taken = folder, 0

    def _path(self, depends: dict[str, Any]) -> tuple[Path, str] | None:
        if self.folder is None:
            return None
        key = json.dumps({"code": code(), "versions": versions(), **depends}, sort_keys=True)
        return self.folder / f"{depends['kind']}-{digest([key.encode()])}.json", key

    def get(self, depends: dict[str, Any]) -> Any | None:
        """The result, or None where there is none that can be read."""
        found = self._path(depends)
        if found is None:
            return None
        try:
            held = json.loads(found[0].read_text(encoding="utf-8"))
            value = held["value"] if held["key"] == found[1] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self.taken += value is not None
        return value

    def put(self, depends: dict[str, Any], value: Any) -> None:
        """Keep a result. A cache that cannot be written (full, read-only) costs nobody the result itself."""
        found = self._path(depends)
        if found is None:
            return
        path, key = found
        part = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=path.stem, suffix=".part", delete=False, encoding="utf-8"
            ) as part:
                json.dump({"key": key, "value": value}, part)
            os.replace(part.name, path)
        except OSError:
            if part is not None:
                with contextlib.suppress(OSError):
                    os.unlink(part.name)
