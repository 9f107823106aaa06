"""Timing for the other scripts: variants take turns in one process, and what is reported is the ratio within each turn."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over the rounds of one variant's time divided by another's in the same round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.median >= 20 else 2
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: for one thread on a machine that others use too


def take_turns(variants: Mapping[str, Callable[[], Any]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one untimed round; every round begins with another variant."""
    now = CLOCKS[clock]
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = now()
            variants[name]()
            if turn >= 0:
                seconds[name].append(now() - start)
    return seconds


def common_options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=rounds)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor seconds, for one thread on a busy machine")
    arguments.add_argument("--json", metavar="FILE", help="write the table as JSON")
    return arguments


def middle(seconds: list[float]) -> float:
    return statistics.median(seconds)


def ratio(slow: list[float], fast: list[float]) -> Ratio:
    shares = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
    return Ratio(middle, low, high)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys in aligned columns."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_json(path: str | None, value: Any) -> None:
    if path:
        Path(path).write_text(json.dumps(value, indent=1, default=lambda item: item.__dict__) + "\n", encoding="utf-8")
