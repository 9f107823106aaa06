"""What trimoe.json says of a decision beside the decision itself: scores, losses of other ways to choose, singular values. Deterministic, and
small: a report is drawn from it, nothing is computed from it."""

from __future__ import annotations

from typing import Any

import torch

from trimoe.calibration.statistics import LayerStats
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop import search, stability
from trimoe.methods.expert_drop.expert_drop import Exhaustive
from trimoe.methods.expert_drop.scores import leave_one_out
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.model.moe_block import MoeBlock

FEW_SETS = 2048  # in a layer, all of which are evaluated beside any search
DRAWS = 1000  # random sets at most that a search is compared with
POINTS = 32  # of a spectrum


def expert_drop(
    step: ExpertDrop, site: MoeBlock, layer: LayerStats, best: search.Found, halves: stability.Halves | None, dropped: int, protected: tuple[int, ...],
    seed: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    """One layer: what goes, each expert's score (higher stays), and the loss beside greedy, random and, of few sets, the best there is.

    `trace` and `random_trace`: [evaluations, best loss so far] of the search and of random draws, wherever it fell.
    """
    row: dict[str, Any] = {
        "dropped": dropped, "drop": best.drops[0], "protected": protected, "evaluations": best.evaluations,
        "tokens_per_expert": layer["count_E"].tolist(), "score": step.importance(layer, seed).tolist(),
    }  # fmt: skip
    if not layer.search:
        return row
    row["search_tokens_per_expert"] = routed(layer)
    if step.score != "leave_one_out":
        row["leave_one_out"] = importance(layer)
    loss = SubsetLoss(layer, device=device)
    if not dropped or dropped > loss.max_drop:
        return row
    space = step.space(site, dropped, protected)
    mask = torch.zeros(len(best.drops), site.num_experts, dtype=torch.bool)
    for place, drop in enumerate(best.drops):
        mask[place, list(drop)] = True
    row["losses"] = loss(mask).tolist()
    row["greedy"] = search.greedy(loss, space).losses[0]
    drawn = search.random(loss, space, draws=min(max(best.evaluations, 20), DRAWS), seed=seed, keep=DRAWS)
    row["random"] = sum(drawn.losses) / len(drawn.losses)
    row["random_trace"] = drawn.trace
    row["trace"] = best.trace
    if isinstance(step.search, Exhaustive) or space.size() <= FEW_SETS:
        found = best if isinstance(step.search, Exhaustive) else search.exhaustive(loss, space)
        row["exhaustive"], row["sets"] = found.losses[0], space.size()
    if halves is not None:
        row["stability"] = halves.jaccard(site.num_experts)
        row["by_other_half"] = {"searched" if step.search is not None else "leave_one_out": halves.loss, "gate": halves.lowest_loss}
    return row


def routed(layer: LayerStats) -> list[int]:
    """How many search tokens chose each expert."""
    chosen_TK = layer.rule.route(layer.search["logits_TE"], layer.bias_E)[1]
    counts: list[int] = torch.bincount(chosen_TK.flatten(), minlength=layer.num_experts).tolist()
    return counts


def importance(layer: LayerStats) -> list[float]:
    """The leave-one-out loss of each expert."""
    return leave_one_out(layer).tolist()


def spectra(layer: LayerStats) -> dict[str, Any]:
    """Singular values of a layer's experts as they were factored (whitened): at POINTS ranks the least, middle and largest over the experts,
    as shares of each matrix's largest."""
    made: dict[str, Any] = {}
    for name in ("in", "out"):
        value_ER = layer[f"{name}_spectrum_ER"].clamp_min(0).sqrt()
        share_ER = value_ER / value_ER[:, :1].clamp_min(1e-30)
        at = torch.linspace(0, share_ER.shape[1] - 1, min(POINTS, share_ER.shape[1])).round().long()
        low, middle, high = (share_ER[:, at].quantile(q, 0).tolist() for q in (0.0, 0.5, 1.0))
        made[name] = {"rank": (at + 1).tolist(), "low": low, "median": middle, "high": high}
    return made
