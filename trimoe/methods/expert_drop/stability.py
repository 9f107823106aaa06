"""Whether another calibration text would keep the same experts: sets chosen by each half of the search tokens, compared with each other and,
by the tokens that they were not chosen on, with the set of the lowest `gate`.

Samples of all domains take turns, so both halves have some of each. J(A, B) = |A and B| / |A or B|, of kept experts; two random sets of K of
E experts have about K / (2 E - K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trimoe.calibration.search_tokens import ENOUGH
from trimoe.calibration.statistics import LayerStats
from trimoe.methods.expert_drop import scores, search
from trimoe.methods.expert_drop.options import Drop
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.model.moe_block import MoeBlock
from trimoe.walk.expert_inputs import FEW

if TYPE_CHECKING:
    from trimoe.methods.expert_drop.expert_drop import ExpertDrop

AGREED = 0.5  # of the way from chance to sameness, over all layers, below which kept sets are called unstable


def chance(kept: int, experts: int) -> float:
    """J of two random sets."""
    return kept / (2 * experts - kept)


@dataclass(frozen=True)
class Halves:
    """What two halves of a layer's search tokens drop, and by the half that did not choose it the relative loss: of those sets, and of `lowest`,
    the set of the lowest `gate`."""

    drops: tuple[Drop, Drop]
    loss: float
    lowest: Drop
    lowest_loss: float

    def jaccard(self, experts: int) -> float:
        """J of what they keep."""
        one, other = (set(range(experts)) - set(drop) for drop in self.drops)
        return len(one & other) / len(one | other)


def halves(
    step: ExpertDrop, site: MoeBlock, layer: LayerStats, dropped: int, protected: tuple[int, ...] = (), device: str = "cpu"
) -> Halves | None:
    """Greedy sets where the step searches, else those of the lowest leave-one-out scores. None where there are no search tokens, or nothing
    can be dropped by them."""
    if not layer.search or not dropped or SubsetLoss(layer, device=device).max_drop < dropped:
        return None
    space, drops = step.space(site, dropped, protected), []
    lowest, tokens = step.lowest(space, scores.gate(layer)).drops[0], len(layer.search["logits_TE"])
    rows = (slice(0, tokens // 2), slice(tokens // 2, tokens))
    parts = [
        LayerStats(layer.layer, layer.rule, layer.sums, {name: tensor[half] for name, tensor in layer.search.items()}, layer.bias_E)
        for half in rows
    ]
    losses = [SubsetLoss(part, device=device) for part in parts]
    for part, loss in zip(parts, losses, strict=True):
        if step.search is not None:
            drops.append(search.greedy(loss, space).drops[0])
        else:
            drops.append(step.lowest(space, scores.leave_one_out(part)).drops[0])
    squared_2 = torch.zeros(2, dtype=torch.float64)
    for drop, other in zip(drops, reversed(losses), strict=True):
        drop_2E = torch.zeros(2, site.num_experts, dtype=torch.bool)
        drop_2E[0, list(drop)] = drop_2E[1, list(lowest)] = True
        squared_2 += (other(drop_2E) * other.norm) ** 2
    own, that = (squared_2.sqrt() / sum(loss.norm**2 for loss in losses) ** 0.5).tolist()
    return Halves((drops[0], drops[1]), own, lowest, that)


def scarce(counts: Mapping[int, Sequence[int]]) -> list[str]:
    """One sentence if experts saw few tokens. `counts`: calibration tokens of each expert, by layer."""
    few = {index: sum(count < FEW for count in layer) for index, layer in counts.items()}
    total, experts = sum(few.values()), sum(map(len, counts.values()))
    if not total or not any(map(any, counts.values())):  # enough; or no text was read at all
        return []
    worst = max(few, key=lambda index: few[index])
    return [f"{total} of {experts} experts saw fewer than {FEW} calibration tokens ({few[worst]} in layer {worst}); more samples help."]


def few_searched(counts: Mapping[int, Sequence[int]], searched: Mapping[int, Sequence[int]]) -> list[str]:
    """One sentence if the search saw few tokens of experts of which the calibration text has more. `counts`, `searched`: calibration and
    search tokens of each expert, by layer."""
    few = {
        index: [expert for expert, (count, own) in enumerate(zip(counts[index], layer, strict=True)) if own < min(ENOUGH, count)]
        for index, layer in searched.items()
    }
    total, worst = sum(map(len, few.values())), max(few, key=lambda index: len(few[index]), default=0)
    if not total:
        return []
    return [
        f"{total} of {sum(map(len, searched.values()))} experts have fewer than {ENOUGH} search tokens and more in the calibration text "
        f"({len(few[worst])} in layer {worst}); a larger calibration.search_tokens helps."
    ]


def warning(layers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """One sentence if the halves agree on little. `layers`: expert_drop's metrics, "stability" and "dropped" of each."""
    found = [row for row in layers.values() if row.get("stability") is not None]
    if not found:
        return None
    counts = [len(row["tokens_per_expert"]) for row in found]
    mean = sum(row["stability"] for row in found) / len(found)
    by_chance = sum(chance(count - row["dropped"], count) for row, count in zip(found, counts, strict=True)) / len(found)
    if mean - by_chance >= AGREED * (1 - by_chance):
        return None
    return (
        f"kept sets are unstable: those that two halves of the calibration choose have a Jaccard index of {mean:.2f} on average "
        f"({by_chance:.2f} is chance, 1 the same); calibrate on more samples."
    )
