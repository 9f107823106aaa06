"""What trimoe.json says of a decision beside the decision itself: scores, losses of other ways to choose, singular values. Deterministic, and
small: a report is drawn from it, nothing is computed from it."""

from __future__ import annotations

from typing import Any

import torch

from trimoe import search, stability
from trimoe.layout import Layout
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop import Exhaustive
from trimoe.modeling_trimoe import BITMASK
from trimoe.scores import leave_one_out
from trimoe.skeleton import Site, Skeleton
from trimoe.stats import LayerStats
from trimoe.subset import SubsetLoss
from trimoe.words import PARTS

FEW_SETS = 2048  # in a layer, all of which are evaluated beside any search
DRAWS = 1000  # random sets at most that a search is compared with
POINTS = 32  # of a spectrum
REST = PARTS[-1]


def expert_drop(
    step: ExpertDrop, site: Site, layer: LayerStats, best: search.Found, dropped: int, protected: tuple[int, ...], seed: int, device: str
) -> dict[str, Any]:
    """One layer: what goes, each expert's score (higher stays), and the loss beside greedy, random and, of few sets, the best there is.

    `trace` and `random_trace`: [evaluations, best loss so far] of the search and of random draws, wherever it fell.
    """
    row: dict[str, Any] = {
        "dropped": dropped, "drop": best.drops[0], "protected": protected, "evaluations": best.evaluations,
        "tokens_per_expert": layer["count_E"].tolist(), "score": step.importance(layer, seed).tolist(),
    }  # fmt: skip
    if not layer.search:
        return row
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
    row["stability"] = stability.jaccard(step, site, layer, dropped, protected, device)
    return row


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


def parts(layout: Layout) -> dict[str, Any]:
    """Tensor bytes [before, after]: outside the layers, and of every decoder layer its routed experts, routers and the rest."""
    skeleton = layout.skeleton
    tensors = skeleton.checkpoint.tensors
    outer = sum(tensors[key].nbytes for key in skeleton.outer_keys)
    layers = {}
    for index, keys in enumerate(skeleton.keys_by_layer):
        part_of = _part_of(skeleton, index)
        made = layout.entries(index) if index in layout.place else []
        sizes = {part: [0, 0] for part in (PARTS if index in skeleton.sites else PARTS[-1:])}
        for key in keys:
            sizes[part_of.get(key, REST)][0] += tensors[key].nbytes
        stems = {**part_of, **{key.removesuffix("weight"): part for key, part in part_of.items()}}
        for entry in made:
            stem = entry.key.removesuffix(BITMASK)
            part = stems.get(stem) or stems.get(stem[: stem.rfind(".") + 1]) or PARTS[0]
            sizes[part][1] += entry.nbytes
        layers[str(index)] = sizes
    return {"outside the layers": [outer, sum(entry.nbytes for entry in layout.groups[0])], "layers": layers}


def _part_of(skeleton: Skeleton, index: int) -> dict[str, str]:
    """Which part every source tensor of a layer belongs to."""
    found = dict.fromkeys(skeleton.keys_by_layer[index], REST)
    site = skeleton.sites.get(index)
    if site is not None:
        block = f"{skeleton.layer_name(index)}.{site.block}."
        routers = tuple(block + path for path in site.router_paths())
        for name, keys in skeleton.conversion.source_of.items():
            if name.startswith(f"{block}{site.experts}.") and name not in routers:
                found |= dict.fromkeys(keys, PARTS[0])
            elif name in routers:
                found |= dict.fromkeys(keys, PARTS[1])
    return found
