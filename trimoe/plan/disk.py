"""How much disk a recipe needs, where, and for what; checked before anything is written."""

from __future__ import annotations

import torch

from trimoe.model.skeleton import Skeleton
from trimoe.plan import measurements
from trimoe.plan.outline import search_bytes
from trimoe.recipe.recipe import Recipe
from trimoe.recipe.recover import Recover
from trimoe.walk.hidden_states import BUDGET, streams_budget

STATISTICS = "statistics, until it is done"
BESIDE = "files beside the weights"
ENTRY, EXPERT, LEAST = 160, 400, 1 << 18  # bytes of a tensor's line in the index, of what is recorded of an expert, and of all else


def output_need(skeleton: Skeleton, recipe: Recipe, result: int, tokens: int) -> dict[str, int]:
    """Bytes in the output folder at once, by what they are: the result of `result` bytes, and what lies in OUT/.trimoe until the run is done."""
    checkpoint, experts = skeleton.checkpoint, sum(site.num_experts for site in skeleton.sites.values())
    beside = (
        sum((checkpoint.folder / name).stat().st_size for name in checkpoint.side_files())
        + ENTRY * len(checkpoint.tensors)
        + EXPERT * experts
        + LEAST
    )
    found = {"result": result, BESIDE: beside}
    kept = sum(statistics(skeleton, recipe, number, tokens) for number in range(len(recipe.steps)))
    if kept:
        found[STATISTICS] = kept
    if recipe.recover is not None:
        found["result before recovery, until it is done"] = result + beside
        found["training, until it is done"] = _training(skeleton, recipe.recover)
    return found


def spilled(skeleton: Skeleton, recipe: Recipe, tokens: int) -> int:
    """Bytes of files in TMPDIR: hidden states, of one walk or of all versions walked side by side, inputs that one layer's experts are
    fitted to, and search tokens of all layers, beyond their budgets in memory."""
    hidden = tokens * next(iter(skeleton.sites.values())).hidden * skeleton.dtype.itemsize
    fitted = any(step.records for step in recipe.steps)
    walked = max(0, hidden - BUDGET) * (2 if fitted else 1)
    sites = list(skeleton.sites.values())
    made = [one.nbytes for step in recipe.steps for one in measurements.of_step(skeleton, step, sites, recipe.calibration, tokens)]
    streams = max(made, default=0) - streams_budget(skeleton.largest_layer, torch.device("cpu"))
    return max(walked, streams) + search_spilled(skeleton, recipe, tokens)


def search_spilled(skeleton: Skeleton, recipe: Recipe, tokens: int) -> int:
    """Bytes of search tokens in TMPDIR, at most: every process of a machine has those of all layers."""
    most = 0
    for step in recipe.steps:
        held = spilled = 0
        for nbytes in search_bytes(step, dict(skeleton.sites), recipe, tokens):
            held += nbytes
            spilled += nbytes if held > BUDGET else 0  # as hidden_states.room has it
        most = max(most, spilled)
    return most


def statistics(skeleton: Skeleton, recipe: Recipe, number: int, tokens: int, needs: frozenset[str] = frozenset()) -> int:
    """Bytes of the file of statistics that a step keeps so that a killed run need not gather them again, of more than it `needs` where that is
    said."""
    step = recipe.steps[number]
    if not step.gathers:
        return 0  # nothing is gathered
    total = sum(search_bytes(step, dict(skeleton.sites), recipe, tokens))
    for site in skeleton.sites.values():
        sums = 2 * site.num_experts**2 + site.num_experts * site.hidden
        if "channels" in step.needs | needs:
            sums += 2 * site.num_experts * (site.hidden + site.width)
        if "spectra" in step.needs:
            sums += site.num_experts * (min(site.first, site.hidden) + min(site.hidden, site.width))
        total += 8 * sums
    return total


def _training(skeleton: Skeleton, spec: Recover) -> int:
    """States of training (numbers, two moments; the best; each beside the one that replaces it) and the original's answers."""
    answers = spec.samples * min(spec.length, skeleton.context) * (8 * spec.top_k + 4) if spec.method in ("router", "logits") else 0
    return 2 * trained(skeleton, spec) * 4 * 4 + answers


def trained(skeleton: Skeleton, spec: Recover) -> int:
    """Parameters that a recovery trains at once, at most; 0 where it is a layer at a time."""
    matrices = [tensor for layer in skeleton.layers for tensor in layer.parameters() if tensor.dim() > 1]
    if spec.by_layer:
        return 0  # into the result itself
    if spec.method == "router":
        return sum(site.num_experts * site.hidden for site in skeleton.sites.values())
    if spec.whole:
        return sum(tensor.numel() for tensor in skeleton.model.parameters())
    if spec.method == "experts":
        return sum(site.num_experts * site.hidden * (site.first + site.width) for site in skeleton.sites.values())
    return sum(spec.rank * _edges(tensor) for tensor in matrices)


def _edges(tensor: torch.Tensor) -> int:
    """Rows and columns of a matrix, or of all matrices in a stack."""
    return (tensor.shape[-1] + tensor.shape[-2]) * (tensor.numel() // (tensor.shape[-1] * tensor.shape[-2]))
