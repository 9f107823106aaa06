"""How numbers and parts of a model are said, the same in tables, cards and pages. Imports nothing of trimoe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

PER = 1000  # tokens that a cache's bytes are stated for

STEPS = ("", "K", "M", "G", "T", "P")
COUNTS = ("", "K", "M", "B", "T")  # as models are spoken of
GONE = {"moe": "MoE sub-layer dropped", "block": "layer dropped"}  # by methods.LayerDecision.gone
PARTS = (
    "embedding",
    "attention",
    "routers",
    "routed experts",
    "shared experts",
    "dense MLPs",
    "norms",
    "head",
    "other",
)  # of a model's bytes


def three(value: float) -> str:
    """Three digits, all of those before the point: 1,234 and 123, 12.3, 2.00, 0.0123."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.995 else f"{value:.3g}"


def short(value: float, steps: Sequence[str] = STEPS) -> str:
    """12345678 -> '12.3M', 2000000 -> '2.00M', 812 -> '812'."""
    power = 0
    while abs(value) >= 999.5 and power < len(steps) - 1:
        value, power = value / 1000, power + 1
    return f"{three(value)}{steps[power]}" if power else f"{value:.0f}"


def counted(number: int, thing: str, several: str | None = None) -> str:
    """'1 round', '5 rounds'; `several` where the plural is another."""
    return f"{number:,} {thing if number == 1 else several or thing + 's'}"


def listed(given: str | os.PathLike[str] | Iterable[Any]) -> list[Any]:
    """One name or path, or several, as they are given in Python."""
    return [given] if isinstance(given, str | os.PathLike) else list(given)


def duration(seconds: float) -> str:
    """75 -> '75 s', 3725 -> '62 min', 5520 -> '1 h 32 min'."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 3] -> '0-3'; with gaps '0-6 (4)', so many of them."""
    if len(numbers) < 3:
        return ", ".join(map(str, numbers))
    whole = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]}-{numbers[-1]}" if whole else f"{numbers[0]}-{numbers[-1]} ({len(numbers)})"


def bounds(low: int, high: int) -> str:
    """'12' where both are the same, else '10 to 12'."""
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def human(count: float) -> str:
    """1234567890 -> '1.15 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError
