"""The expected time of a recipe: the work that work.py counts, at the speed that machine.py measures."""

from __future__ import annotations

from typing import Any

from trimoe.machine import Rates, rates
from trimoe.recipe import Recipe
from trimoe.skeleton import Skeleton
from trimoe.work import Amount, Work

NOTE = "Counted from shapes, at speeds measured on this machine; other work on it makes it longer. Start, tokenising and recovery are not in it."


def estimate(skeleton: Skeleton, recipe: Recipe, *, processes: int = 1, device: str = "cpu", speed: Rates | None = None) -> dict[str, Any]:
    """Seconds and work of every stage, and with several `processes` (each as fast as this machine is now) their seconds and the bytes that
    they send to each other. Stages in the order of the run; of several statistics passes each is one. Where `device` cannot be used here,
    `speed` has to be given."""
    speed = rates(device, skeleton.dtype) if speed is None else speed
    rows = []
    for stage in Work(skeleton, recipe, cpu=device == "cpu").stages():
        shared, repeated = _seconds(stage.shared, speed), _seconds(stage.repeated, speed)
        rows.append({
            "stage": stage.name, "seconds": shared + repeated, "shared_seconds": shared / processes + repeated,
            "network_bytes": round(stage.network(processes)), "flops": sum(n for kind, n, _ in stage.shared if kind in ("matmul", "double")),
            "read_bytes": sum(n for kind, n, _ in stage.repeated if kind == "read"),
        })  # fmt: skip
    total = {name: sum(row[name] for row in rows) for name in ("seconds", "shared_seconds", "network_bytes")}
    return {"device": device, "processes": processes, "stages": rows, **total, "note": NOTE}


def _seconds(work: list[Amount], speed: Rates) -> float:
    return sum(speed.seconds(kind, amount, rows) for kind, amount, rows in work)
