"""What trimoe.json says of a decision beside the decision itself: scores, losses of other ways to choose, singular values. Deterministic, and
small: a report is drawn from it, nothing is computed from it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimoe import search, stability
from trimoe.entry import Entry
from trimoe.layout import Layout
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop import Exhaustive
from trimoe.modeling_trimoe import BITMASK
from trimoe.scores import leave_one_out
from trimoe.site import Site
from trimoe.skeleton import Skeleton
from trimoe.stats import LayerStats
from trimoe.subset import SubsetLoss
from trimoe.words import PARTS

FEW_SETS = 2048  # in a layer, all of which are evaluated beside any search
DRAWS = 1000  # random sets at most that a search is compared with
POINTS = 32  # of a spectrum


def expert_drop(
    step: ExpertDrop, site: Site, layer: LayerStats, best: search.Found, halves: stability.Halves | None, dropped: int, protected: tuple[int, ...],
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


def earlier(source: Path) -> list[Any]:
    """Return the recipes that made `source`, first to last, if it is itself a result of trimoe; none where it is not, or says nothing usable."""
    try:
        record = json.loads((source / "trimoe.json").read_text(encoding="utf-8"))
        return [*record.get("earlier", []), record["recipe"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def parts(layout: Layout) -> dict[str, Any]:
    """Tensor bytes [before, after] by PARTS, in that order and without those that are nowhere: outside the layers, and of every decoder layer.

    `attention` is whatever mixes tokens (recurrent layers and convolutions too); `shared experts` is what runs beside the routed ones.
    """
    skeleton = layout.skeleton
    layers = {}
    for index in range(len(skeleton.keys_by_layer)):
        gone = index in layout.decisions and layout.decisions[index].gone is not None
        made = layout.entries(index) if index in layout.place else []
        layers[str(index)] = _sizes(skeleton, _part_of(skeleton, index), made, "dense MLPs" if gone else "routed experts")
    return {"outside the layers": _sizes(skeleton, _outside(skeleton), layout.groups[0], "other"), "layers": layers}


def _sizes(skeleton: Skeleton, part_of: Mapping[str, str], made: Sequence[Entry], new: str) -> dict[str, list[int]]:
    """By part: bytes of the source's tensors `part_of` and of those `made` of them; `new`: what is in no place of the source's."""
    sizes = {part: [0, 0] for part in PARTS if part in part_of.values() or (part == new and made)}
    for key, part in part_of.items():
        sizes[part][0] += skeleton.checkpoint.tensors[key].nbytes
    stems = {**part_of, **{key.removesuffix("weight"): part for key, part in part_of.items()}}
    for entry in made:
        if entry.zeros and entry.stands_for == 0:  # the guard of native forms
            sizes.setdefault("other", [0, 0])[1] += entry.nbytes
            continue
        stem = entry.key.removesuffix(BITMASK)
        sizes[stems.get(stem) or stems.get(stem[: stem.rfind(".") + 1]) or new][1] += entry.nbytes
    return {part: sizes[part] for part in PARTS if any(sizes.get(part, ()))}


def _outside(skeleton: Skeleton) -> dict[str, str]:
    """Which part every source tensor outside the layers belongs to."""
    model = skeleton.model
    owners = {id(module): part for module, part in ((model.get_output_embeddings(), "head"), (model.get_input_embeddings(), "embedding"))}
    named: dict[str, str] = {}
    for name, module in model.named_modules():
        part = owners.get(id(module)) or ("norms" if _vectors(module) else "other")
        named |= {f"{name}.{own}": part for own, _ in module.named_parameters(recurse=False)}
    found = dict.fromkeys(skeleton.outer_keys, "other")
    for name, keys in sorted(
        skeleton.conversion.source_of.items(), key=lambda item: named.get(item[0]) == "embedding"
    ):  # a shared table is one
        found |= {key: named.get(name, "other") for key in keys if key in found}
    return found


def _part_of(skeleton: Skeleton, index: int) -> dict[str, str]:
    """Which part every source tensor of a layer belongs to."""
    found, prefix = dict.fromkeys(skeleton.keys_by_layer[index], "other"), f"{skeleton.layer_name(index)}."
    for name, keys in skeleton.conversion.source_of.items():
        if name.startswith(prefix):
            found |= dict.fromkeys(keys, _part(skeleton, index, name.removeprefix(prefix)))
    return found


def _part(skeleton: Skeleton, index: int, path: str) -> str:
    """Of the tensor `path` of a layer."""
    site, child = skeleton.sites.get(index), path.partition(".")[0]
    if site is not None and path.startswith(f"{site.block}."):
        inside = path.removeprefix(f"{site.block}.")
        if inside in site.router_paths():
            return "routers"
        return "routed experts" if inside.startswith(f"{site.experts}.") else "shared experts"
    module = getattr(skeleton.layers[index], child, None)
    if not isinstance(module, nn.Module):
        return "other"
    if _vectors(module):
        return "norms"
    if len(inspect.signature(module.forward).parameters) > 1:  # it is told of other tokens: their mask, their places, its cache
        return "attention"
    return "dense MLPs" if site is None else "shared experts"


def _vectors(module: nn.Module) -> bool:
    return all(parameter.dim() < 2 for parameter in module.parameters())
