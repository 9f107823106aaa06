"""What form a result has, in words."""

from __future__ import annotations

from typing import Any

STOCK, PACKED, NATIVE = "stock", "compressed-tensors", "native"


def form_of(plan: dict[str, Any]) -> str:
    """Of a plan's JSON: `stock` loads in whatever knows the family, `compressed-tensors` (weights are packed integers) with the
    compressed-tensors package, `native` with trimoe or its modeling file, and `native with compressed-tensors` with both."""
    packed = any(row.get("bits") for row in plan["layers"])
    if plan["form"] == NATIVE:
        return f"{NATIVE} with {PACKED}" if packed else NATIVE
    return PACKED if packed else STOCK
