"""The expected time of a recipe: the work that work.py counts, at the speed that machine.py measures."""

from __future__ import annotations

import math
from typing import Any

import torch

from trimoe.advice import reads_text
from trimoe.calibration import check_shared_out, most_tokens, per_batch
from trimoe.errors import UserError
from trimoe.machine import Rates, rates
from trimoe.recipe import Recipe
from trimoe.skeleton import Skeleton
from trimoe.stream import usable_device
from trimoe.work import Amount, Work

NOTE = "Counted from shapes, at speeds measured on this machine; other work on it makes it longer. Start, tokenising and recovery are not in it."
BUSY = " The machine is busy with something else: this process got {free:.0%} of its processors while it was measured. Ask again when it is not."
UNKNOWN = "The speed of {device} is not known here: seconds are FLOPs / (processes x FLOP/s reached), or bytes read / (bytes/s of the disk), whichever is more."


def estimate(skeleton: Skeleton, recipe: Recipe, *, processes: int = 1, device: str = "cpu", speed: Rates | None = None) -> dict[str, Any]:
    """Seconds and work of every stage, and with several `processes` (each as fast as this machine is now) their seconds and the bytes that
    they send to each other. Stages in the order of the run; of several statistics passes each is one. Where `device` cannot be used here and
    no `speed` is given, seconds are None."""
    check_processes(skeleton, recipe, processes, device)
    note = NOTE
    if speed is None:
        try:
            speed = rates(str(usable_device(device)), skeleton.dtype)
        except UserError:
            note = UNKNOWN.format(device=device)
    if speed is not None and speed.busy:
        note += BUSY.format(free=speed.free)
    rows: list[dict[str, Any]] = []
    for stage in Work(skeleton, recipe, device=device).stages():
        shared, repeated = (None, None) if speed is None else (_seconds(stage.shared, speed), _seconds(stage.repeated, speed))
        rows.append({
            "stage": stage.name, "seconds": None if shared is None or repeated is None else shared + repeated,
            "shared_seconds": None if shared is None or repeated is None else shared / processes + repeated,
            "network_bytes": round(stage.network(processes)), "flops": _sum(stage.shared, "matmul", "double"), "read_bytes": _sum(stage.repeated, "read"),
        })  # fmt: skip
    amounts = [name for name in rows[0] if name != "stage"] if rows else []
    total: dict[str, Any] = {name: None if rows[0][name] is None else sum(row[name] for row in rows) for name in amounts}
    return {"device": device, "processes": processes, "stages": rows, **total, "note": note}


def check_processes(skeleton: Skeleton, recipe: Recipe, processes: int, device: str) -> None:
    """Raises UserError for a word that names no device, and where some of the processes would have no text to walk."""
    check_device(device)
    if not any(map(reads_text, recipe.steps)):
        return
    spec, length = recipe.calibration, min(recipe.calibration.length, skeleton.context)
    samples = most_tokens(spec.sources, spec.samples, length) // length
    check_shared_out(math.ceil(samples / per_batch(length, device)), processes)


def check_device(device: str) -> None:
    """Raises UserError for a word that names no device; one that is not in this machine may be planned for."""
    try:
        torch.device(device)
    except RuntimeError:
        raise UserError(f"The device {device!r} is not known; cpu, cuda, cuda:1 ... are.") from None


def _sum(work: list[Amount], *kinds: str) -> float:
    return sum(amount for kind, amount, _ in work if kind in kinds)


def _seconds(work: list[Amount], speed: Rates) -> float:
    return sum(speed.seconds(kind, amount, rows) for kind, amount, rows in work)
