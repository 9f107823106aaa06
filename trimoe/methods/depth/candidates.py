"""Parts of a model's depth that can be dropped, MoE sub-layers and whole decoder layers, and choosing among them by similarity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trimoe.calibration.statistics import Stats
from trimoe.errors import UserError
from trimoe.model.decision import Decisions, kept_layers
from trimoe.model.depth_config import droppable_blocks, explicit
from trimoe.model.skeleton import Skeleton

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
        both = f", not {' and '.join(given)}" if given else ""
        raise UserError(f"{name}: give one of ratio, count and threshold{both}.")
    if consecutive and threshold is not None:
        raise UserError(f"{name}: a threshold does not say how long a consecutive run is; give ratio or count.")
    if consecutive and rerank:
        raise UserError(f"{name}: rerank: kl drops one after the other, wherever they lie; it wants choose: discrete.")
    if rerank and threshold is not None:
        raise UserError(f"{name}: a threshold is on the similarity, so there is nothing to rerank; give ratio or count.")


@dataclass(frozen=True)
class Depth:
    """What is left of a model's depth before a step: its decoder layers in order, those with a MoE block, those whose MoE block was
    dropped, those that can go whole, and each layer's kind (of attention) where there are several."""

    layers: tuple[int, ...]
    moe: tuple[int, ...]
    emptied: tuple[int, ...]
    blocks: tuple[int, ...]
    kinds: Mapping[int, str]

    def allows(self, dropped: Sequence[Part]) -> bool:
        """Whether a MoE block and a layer of every kind stay."""
        gone = {index for _, index in dropped}
        whole = {index for kind, index in dropped if kind == "block"}
        return bool(set(self.moe) - gone) and {self.kinds[i] for i in self.layers} == {self.kinds[i] for i in self.layers if i not in whole}

    def sub_layers(self, part: Part, dropped: Sequence[Part]) -> int:
        """How many sub-layers one more part takes away: a decoder layer has two, unless its MoE block is gone."""
        return 1 if part[0] == "moe" or part[1] in self.emptied or ("moe", part[1]) in dropped else 2

    def cost(self, part: Part, dropped: Sequence[Part], *, mixed: bool) -> int:
        """How much of the count a part takes: in mixtures sub-layers are counted, else parts."""
        return self.sub_layers(part, dropped) if mixed else 1

    def add(self, dropped: Sequence[Part], part: Part, total: int | None, *, mixed: bool) -> list[Part]:
        """`dropped` with one more part, if the count allows it, it is not gone already, and enough stays."""
        if part in dropped or ("block", part[1]) in dropped:
            return list(dropped)
        grown = [other for other in dropped if other[1] != part[1]] + [part]
        fits = total is None or self.spent(grown, mixed=mixed) <= total
        return grown if fits and self.allows(grown) else list(dropped)

    def spent(self, dropped: Sequence[Part], *, mixed: bool) -> int:
        return sum(self.cost(part, (), mixed=mixed) for part in dropped)

    def most(self, candidates: Sequence[Part], *, mixed: bool) -> int:
        """The largest count that can be had."""
        dropped: list[Part] = []
        for part in candidates:
            dropped = self.add(dropped, part, None, mixed=mixed)
        return self.spent(dropped, mixed=mixed)


def wanted(name: str, ratio: float | None, count: int | None, of: int, most: int, what: str) -> int | None:
    """How many of `of` go, None where a threshold says. Raises UserError unless between 1 and `most` do."""
    if most < 1:
        raise UserError(f"{name}: none of the {of} {what} can go: a MoE block and a layer of every kind must stay.")
    if ratio is None and count is None:
        return None
    total = count if count is not None else round(ratio * of)  # type: ignore[operator]
    if not 1 <= total <= most:
        given = f"count {count}" if count is not None else f"ratio {ratio}"
        raise UserError(f"{name}: {given} means {total} of {of} {what}; 1 to {most} can go.")
    return total


def pick(
    similar: Mapping[Part, float],
    depth: Depth,
    total: int | None,
    *,
    threshold: float = 2.0,
    consecutive: bool = False,
    mixed: bool = False,
) -> list[Part]:
    """The parts to drop, most similar first; of equals the later layer. Without `total`, all whose similarity is above `threshold`."""
    if consecutive:
        assert total is not None
        return _run(similar, depth, total)
    chosen: list[Part] = []
    for part in ranked(similar, mixed=mixed):
        if total is not None or similar[part] > threshold:
            chosen = depth.add(chosen, part, total, mixed=mixed)
    return chosen


def ranked(similar: Mapping[Part, float], *, mixed: bool) -> list[Part]:
    """Most similar first; in a mixture the dissimilarity of a block is shared out over its two sub-layers."""
    return sorted(similar, key=lambda part: ((1 - similar[part]) / (2 if mixed and part[0] == "block" else 1), -part[1]))


def _run(similar: Mapping[Part, float], depth: Depth, total: int) -> list[Part]:
    """The most similar run of `total` neighbours: MoE layers one after the other, or decoder layers."""
    kind = next(iter(similar))[0]
    places = depth.moe if kind == "moe" else depth.layers
    runs = [[(kind, index) for index in places[start : start + total]] for start in range(len(places) - total + 1)]
    runs = [run for run in runs if all(part in similar for part in run) and depth.allows(run)]
    if not runs:
        raise UserError(f"There is no run of {total} consecutive layers that can go; give a smaller count, or choose: discrete.")
    return max(runs, key=lambda run: (sum(similar[part] for part in run), run[0][1]))


def left(skeleton: Skeleton, decisions: Decisions, *, blocks: bool) -> Depth:
    """What is left of the model's depth; `blocks`: whole layers are to be dropped. Raises UserError where none can be."""
    layers = kept_layers(skeleton, decisions)
    emptied = tuple(i for i in layers if i in decisions and decisions[i].gone == "moe")
    types = explicit(skeleton, {}).get("layer_types") or [""] * len(skeleton.layers)
    return Depth(
        layers=tuple(layers), moe=tuple(i for i in layers if i in skeleton.sites and i not in emptied), emptied=emptied,
        blocks=tuple(i for i in droppable_blocks(skeleton) if i in layers) if blocks else (), kinds=dict(enumerate(types)),
    )  # fmt: skip
