"""Parts of a model's depth that can be dropped, MoE sub-layers and whole decoder layers, and choosing among them by similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from trimoe.errors import UserError
from trimoe.stats import Stats

Part = tuple[Literal["moe", "block"], int]  # what is dropped, and the decoder layer's number


def similarity(part: Part, stats: Stats, metric: str) -> float:
    """Mean cosine over tokens between what comes in and what goes out, float64. Needs statistics gathered with "cosines"."""
    kind, index = part
    if kind == "block":
        total, tokens = stats.blocks[index].tolist()
        return total / tokens
    layer = stats.layers[index]
    return float(layer["sublayer_cosine" if metric == "residual" else "output_cosine"] / layer["tokens"])


def check(name: str, ratio: float | None, count: int | None, threshold: float | None, *, consecutive: bool, rerank: bool) -> None:
    """Raises UserError unless exactly one of the three says how many go, and what goes with it."""
    given = [field for field, value in (("ratio", ratio), ("count", count), ("threshold", threshold)) if value is not None]
    if len(given) != 1:
        raise UserError(f"{name}: give one of ratio, count and threshold, not {' and '.join(given) or 'none'}.")
    if consecutive and threshold is not None:
        raise UserError(f"{name}: a threshold does not say how long a consecutive run is; give ratio or count.")
    if consecutive and rerank:
        raise UserError(f"{name}: rerank: kl drops one after the other, wherever they lie; it wants choose: discrete.")
    if rerank and threshold is not None:
        raise UserError(f"{name}: a threshold is on the similarity, so there is nothing to rerank; give ratio or count.")


def wanted(name: str, ratio: float | None, count: int | None, available: int, what: str) -> int | None:
    """How many of `available` go, None where a threshold says. Raises UserError unless at least one goes and one stays."""
    if ratio is None and count is None:
        return None
    total = count if count is not None else round(ratio * available)  # type: ignore[operator]
    if not 1 <= total < available:
        given = f"count {count}" if count is not None else f"ratio {ratio}"
        raise UserError(f"{name}: {given} means {total} of {available} {what}; 1 to {available - 1} can go.")
    return total


def cost(part: Part, dropped: Sequence[Part], *, mixed: bool) -> int:
    """How much of the count one more part takes: where blocks and MoE sub-layers are mixed, a block is two sub-layers."""
    if not mixed or part[0] == "moe":
        return 1
    return 1 if ("moe", part[1]) in dropped else 2


def pick(
    similar: Mapping[Part, float], total: int | None, *, threshold: float | None = None, consecutive: bool = False, mixed: bool = False
) -> list[Part]:
    """The parts to drop, most similar first; of equals the later layer. At least one layer of each kind of candidate stays."""
    order = sorted(similar, key=lambda part: (-_merit(part, similar, mixed), -part[1]))
    if threshold is not None:
        return [part for part in order if similar[part] > threshold][: len(order) - 1]
    assert total is not None
    if consecutive:
        places = sorted(similar, key=lambda part: part[1])
        runs = [places[start : start + total] for start in range(len(places) - total + 1)]
        return max(runs, key=lambda run: (sum(similar[part] for part in run), run[0][1]))
    chosen: list[Part] = []
    for part in order:
        chosen = add(chosen, part, total, mixed=mixed)
    return chosen


def add(chosen: Sequence[Part], part: Part, total: int, *, mixed: bool) -> list[Part]:
    """`chosen` with one more part, if the count allows it and the part is not gone already."""
    spent = sum(2 if mixed and kind == "block" else 1 for kind, _ in chosen)
    if part in chosen or ("block", part[1]) in chosen or spent + cost(part, chosen, mixed=mixed) > total:
        return list(chosen)
    return [other for other in chosen if other[1] != part[1]] + [part]


def _merit(part: Part, similar: Mapping[Part, float], mixed: bool) -> float:
    """Similarity; in a mixture the dissimilarity is shared out over the sub-layers that go."""
    return 1 - (1 - similar[part]) / (2 if mixed and part[0] == "block" else 1)
