"""How numbers and parts of a model are said, the same in tables, cards and pages. Imports nothing of trimoe."""

from __future__ import annotations

from collections.abc import Sequence

STEPS = ("", "K", "M", "G", "T", "P")
GONE = {"moe": "MoE sub-layer dropped", "block": "layer dropped"}  # by methods.LayerDecision.gone
PARTS = ("embedding", "attention", "routers", "routed experts", "shared experts", "dense MLPs", "norms", "head", "other")  # of a model's bytes


def short(value: float) -> str:
    """12345678 -> '12.3M'."""
    power = 0
    while abs(value) >= 999.5 and power < len(STEPS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{STEPS[power]}" if power else f"{value:.0f}"


def duration(seconds: float) -> str:
    """3725 -> '1 h 02 min'."""
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
