"""What a statistics file adds to a plan, without a weight: how stable kept sets are, how many tokens experts saw, and the traffic of expert
parallelism before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimoe import scores, stability
from trimoe.errors import UserError
from trimoe.methods import ExpertDrop
from trimoe.recipe import Recipe
from trimoe.seen import FEW
from trimoe.skeleton import Skeleton
from trimoe.stats import Stats
from trimoe.traffic import WAYS, Traffic


def known(skeleton: Skeleton, recipe: Recipe, path: Path) -> tuple[list[str], dict[str, dict[str, float]]]:
    """(warnings, traffic by number of devices): hidden-state bytes a token, `before`, and `after` as many experts of every layer as the
    recipe's first step drops, those of the lowest leave-one-out scores. Of the file's search tokens; none, no traffic."""
    stats, step = Stats.load(path), recipe.steps[0]
    counts = {index: layer.num_experts for index, layer in stats.layers.items()}
    if counts != {index: site.num_experts for index, site in skeleton.sites.items()}:
        raise UserError(f"The statistics file {path} is of another model: its layers and experts are not those of {skeleton.name}.")
    warnings = _scarce(stats)
    if not isinstance(step, ExpertDrop):
        return warnings, {}
    dropped, rows = step.uniform(skeleton.sites), {}
    before, after = Traffic(), Traffic()
    for index, layer in stats.layers.items():
        site = skeleton.sites[index]
        row = {
            "dropped": dropped[index],
            "tokens_per_expert": layer["count_E"],
            "stability": stability.jaccard(step, site, layer, dropped[index]),
        }
        rows[str(index)] = row
        if not layer.search:
            continue
        logits_TE, everyone_T = layer.search["logits_TE"], torch.ones(len(layer.search["logits_TE"]), dtype=torch.bool)
        before.add(index, site.num_experts, site.hidden, site.rule.route(logits_TE, layer.bias_E)[1], everyone_T)
        drop = step.lowest(step.space(site, dropped[index], ()), scores.leave_one_out(layer)).drops[0] if dropped[index] else ()
        keep_E = torch.ones(site.num_experts, dtype=torch.bool)
        keep_E[list(drop)] = False
        number_E = keep_E.long().cumsum(0) - 1  # experts that stay are numbered anew
        chosen = number_E[site.rule.route(logits_TE, layer.bias_E, keep_E)[1]]
        after.add(index, site.num_experts - len(drop), site.hidden, chosen, everyone_T)
    unstable = stability.warning(rows)
    return warnings + ([unstable] if unstable else []), _ways(before, after)


def _scarce(stats: Stats) -> list[str]:
    few = {index: int((layer["count_E"] < FEW).sum()) for index, layer in stats.layers.items()}
    total, experts = sum(few.values()), sum(layer.num_experts for layer in stats.layers.values())
    if not total:
        return []
    worst = max(few, key=lambda index: few[index])
    return [f"{total} of {experts} experts saw fewer than {FEW} calibration tokens ({few[worst]} in layer {worst}); more samples help."]


def _ways(before: Traffic, after: Traffic) -> dict[str, dict[str, Any]]:
    found = {}
    for ways in WAYS:
        one, other = before.report(ways) if before.layers else None, after.report(ways) if after.layers else None
        if one is not None and other is not None:
            found[str(ways)] = {"before": one["bytes_per_token"], "after": other["bytes_per_token"]}
    return found
