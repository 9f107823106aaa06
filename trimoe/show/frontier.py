"""Results beside each other: the interval of a mean over texts, and what nothing beats. Imports nothing of trimoe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

DIGITS = 6  # of a KL in nats per token
SHARE_DIGITS = 3  # of a size as a share of the original's: a tenth of a percent, as it is shown


def of_mean_kl(texts: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Ends of the interval of the mean KL over the rows of several texts; None where one of them has none, or no number. Texts are independent of each
    other, so the half-widths of their intervals add in squares. A KL is never below 0."""
    if any((text.get("intervals") or {}).get("kl") is None for text in texts):
        return None, None
    mean = sum(text["kl"] for text in texts) / len(texts)
    if not math.isfinite(mean):
        return None, None
    down, up = (math.hypot(*(text["kl"] - text["intervals"]["kl"][end] for text in texts)) / len(texts) for end in (0, 1))
    return max(0.0, mean - down), mean + up


def unbeaten(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of pairs (share of the original's bytes, KL), whether no other is as small and as near to the original, and better in one of the two.
    Without a finite KL: no. KLs are compared to DIGITS digits: what lies behind is rounding of float32; sizes to SHARE_DIGITS: a few hundred
    bytes less of a header are no reason to take a worse model."""
    seen = [(round(share, SHARE_DIGITS), round(kl, DIGITS) if math.isfinite(kl) else kl) for share, kl in points]

    def beaten(size: float, kl: float) -> bool:
        return any(other != (size, kl) and other[0] <= size and other[1] <= kl for other in seen)

    return [math.isfinite(kl) and not beaten(size, kl) for size, kl in seen]
