"""How much memory there is: of this machine, of the control group that this process runs in, and of a GPU."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

IMPORTS = 336 << 20  # bytes of its own that a process takes for Python, torch, transformers and peft: 305 MiB, and what its heap keeps
GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
NONE = 1 << 60  # first version's groups say that there is no limit by a number near 2^63


def host() -> int:
    """Return the bytes that this process can take at most: memory and swap of the machine, or less where its control group allows less.
    Pages of files that are mapped or cached take none: they give way."""
    return min(psutil.virtual_memory().total + psutil.swap_memory().total, *(_group_limits() or [NONE]))


def device(name: str) -> int | None:
    """Return the bytes of a GPU; None for a device that is none, or is not here."""
    place = torch.device(name)
    if place.type != "cuda" or not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count():
        return None
    return int(torch.cuda.get_device_properties(place).total_memory)


def _group_limits() -> list[int]:
    """The limits of this process's control group and of those around it, in either version of them."""
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        first = "memory" in kinds.split(",")
        if kinds and not first:
            continue
        base = GROUPS / "memory" if first else GROUPS
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder != base and base not in folder.parents:
                break
            limit = _number(folder / ("memory.limit_in_bytes" if first else "memory.max"))
            if limit is not None:
                found.append(limit + (0 if first else _swap(folder / "memory.swap.max")))
    return found


def _swap(path: Path) -> int:
    """The swap that a group may take: the machine's where its file says "max", none where there is no such file."""
    if not path.is_file():
        return 0
    own = _number(path)
    return int(psutil.swap_memory().total) if own is None else own


def _number(path: Path) -> int | None:
    """What a file says; None where it says "max", no number, or is not there."""
    try:
        value = int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if value < NONE else None
