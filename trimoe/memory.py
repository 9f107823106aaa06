"""How much memory a recipe takes, stage by stage, at most: one decoder layer, what is made beside it, and what is carried from layer to layer.

Bounds, counted from shapes; LOG.md has measurements beside them. Letters as in work.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from trimoe import disk, measurements
from trimoe.calibration import batch_tokens
from trimoe.methods import LowRank, Quantize, Step, WeightPrune
from trimoe.methods.low_rank import rank_share
from trimoe.methods.method import Decisions
from trimoe.recipe import Recipe
from trimoe.recover.spec import Recover
from trimoe.site import Site
from trimoe.skeleton import LOGITS, Skeleton
from trimoe.spill import BUDGET, streams_budget
from trimoe.subset import gram_bytes, search_budget

IMPORTS = 480 << 20  # bytes that Python, torch, transformers and their buffers take
TABLES = 5  # of logits, in float32, that are held at once where versions are compared


def of_stages(skeleton: Skeleton, recipe: Recipe, decisions: Decisions, tokens: int, parameters: int, device: str) -> dict[str, int]:
    """Bytes of memory at the peak of each stage, the host's and the device's together. `decisions`: final ones, or stand-ins of
    the right sizes; `parameters`: the result's."""
    found: dict[str, int] = {}
    for name, size in _stages(skeleton, recipe, decisions, tokens, device):
        found[name] = max(found.get(name, 0), IMPORTS + size)
    if recipe.recover is not None:
        found["recovery"] = IMPORTS + _recovery(skeleton, recipe.recover, parameters)
    return found


def _stages(skeleton: Skeleton, recipe: Recipe, decisions: Decisions, tokens: int, device: str) -> Iterator[tuple[str, int]]:
    wide = batch_tokens(device)
    site, item = max(skeleton.sites.values(), key=lambda site: site.num_experts * site.width), skeleton.dtype.itemsize
    hidden = min(BUDGET, site.hidden * tokens * item)
    outside = sum(math.prod(skeleton.checkpoint.tensors[key].shape) for key in skeleton.outer_keys) * item
    staging, cut = _staging(skeleton), _cut(skeleton, decisions)
    batch = _batch(site, min(tokens, max(wide, min(recipe.calibration.length, skeleton.context))), item)
    kept = 0  # statistics of all layers; a file of them that is given stays until the end
    for step in recipe.steps:
        if not step.gathers:
            continue
        layer = skeleton.largest_layer + (staging if step is recipe.steps[0] else max(staging, cut))
        kept = max(
            kept, _grams(skeleton, step, recipe, tokens) + int(1.5 * _sums(skeleton, step))
        )  # of sums, which are gathered in pieces, then joined
        recorded = hidden + _fit(site, step) if "spectra" in step.needs else 0
        yield "statistics", max(outside + hidden, layer + batch + hidden + recorded + kept)
        made = measurements.of_step(skeleton, step, list(skeleton.sites.values()), recipe.calibration, tokens)
        if made:
            logits = TABLES * 4 * min(LOGITS, wide * skeleton.config.get_text_config().vocab_size)
            streams = min(streams_budget(skeleton.largest_layer, torch.device(device)), max(one.nbytes for one in made))
            yield "measuring", kept + streams + max(layer + batch, outside + logits)
    last = [step for step in recipe.steps if isinstance(step, LowRank | Quantize | WeightPrune)]
    if not last:
        yield "writing", kept + 2 * max(info.nbytes for info in skeleton.checkpoint.tensors.values())  # a stack is read to be cut
        return
    fitted = any(isinstance(step, LowRank) or step.calibrated for step in last)
    recorded = 2 * hidden + batch if fitted else 0
    made = sum(_made(skeleton, decisions, step) for step in last)
    beside = max(staging, cut, made + max(_fit(site, step) for step in last))
    yield "writing", max(outside + hidden, kept + recorded + skeleton.largest_layer + beside)


def _recovery(skeleton: Skeleton, spec: Recover, parameters: int) -> int:
    """Training, in float32: a layer of both models with gradients and two moments, or the whole result (and the original, whose experts are
    learnt from) with those of what is trained, and a batch's logits."""
    if spec.method == "experts" and spec.stream:
        return 5 * skeleton.largest_layer
    whole = parameters + (sum(math.prod(info.shape) for info in skeleton.checkpoint.tensors.values()) if spec.method == "experts" else 0)
    logits = spec.batch * min(spec.length, skeleton.context) * skeleton.config.get_text_config().vocab_size
    return 4 * whole + 16 * disk.trained(skeleton, spec) + 3 * 4 * logits


def _staging(skeleton: Skeleton) -> int:
    """Bytes beside the layer while it is filled: stacked experts are read into their place piece by piece, all else is read and then put."""
    most, tensors = 0, skeleton.checkpoint.tensors
    for index, keys in enumerate(skeleton.keys_by_layer):
        site, prefix = skeleton.sites.get(index), skeleton.layer_name(index) + "."
        paths = [] if site is None else [f"{prefix}{site.block}.{path}" for path in site.weight_paths()]
        inside = {key for name in skeleton.conversion.stacked if name.startswith(prefix) for key in skeleton.source_keys(name)}
        apart = [found for name in paths if (found := [key for key in skeleton.source_keys(name) if key not in inside])]
        rest = [key for key in keys if key not in inside and not any(key in found for found in apart)]
        # what transformers puts together itself is there as it was read, put together, and in the dtype that is computed in
        sizes = [2 * sum(_compute(skeleton, key) for key in found) for found in apart]
        most = max(most, sum(tensors[key].nbytes for key in rest), *sizes)
    return most


def _compute(skeleton: Skeleton, key: str) -> int:
    info = skeleton.checkpoint.tensors[key]
    return max(info.nbytes, math.prod(info.shape) * skeleton.dtype.itemsize)


def _experts(site: Site) -> int:
    """Parameters of one expert."""
    return site.first * site.hidden + site.hidden * site.width


def _cut(skeleton: Skeleton, decisions: Decisions) -> int:
    """Bytes of the larger stack of those experts that stay, while the whole stack is still there."""
    cuts = [
        len(decisions[index].keep) * max(site.first, site.width) * site.hidden
        for index, site in skeleton.sites.items()
        if decisions[index].gone is None and len(decisions[index].keep) < site.num_experts
    ]
    return max(cuts, default=0) * skeleton.dtype.itemsize


def _batch(site: Site, tokens: int, item: int) -> int:
    """Bytes of what one batch leaves behind in a layer: in attention, all experts' outputs twice, and one expert's share if it had every token."""
    return tokens * item * ((8 + 2 * site.rule.top_k) * site.hidden + 2 * (site.hidden + site.first + site.width))


def _grams(skeleton: Skeleton, step: Step, recipe: Recipe, tokens: int) -> int:
    """Bytes of search tokens in memory: of all layers up to a budget, and of the one layer that is searched, which may lie in a file."""
    every, reach, spec = list(skeleton.sites.values()), step.reach(skeleton.sites), recipe.calibration
    count = min(tokens, search_budget(every, reach, spec.search_tokens, spec.search_memory))
    whole, most = count * gram_bytes(every, reach), count * max(gram_bytes([site], reach) for site in every)
    return whole if whole <= BUDGET else BUDGET + most


def _sums(skeleton: Skeleton, step: Step) -> int:
    """Bytes of all layers' statistics in float64, search tokens aside."""
    total = 0
    for site in skeleton.sites.values():
        total += 2 * site.num_experts**2 + site.num_experts * (3 * site.hidden + 2 * site.width)
        if "spectra" in step.needs:
            total += site.num_experts * (min(site.first, site.hidden) + min(site.hidden, site.width))
    return 8 * total


def _fit(site: Site, step: Step) -> int:
    """Bytes of one expert's factorisations: moments, their factors and eigenvectors, the matrix itself, in float64."""
    if isinstance(step, Quantize | WeightPrune) and not step.calibrated:
        return 4 * 6 * max(site.first * site.hidden, site.hidden * site.width)
    return 8 * max(6 * n * n + 6 * m * n for m, n in ((site.first, site.hidden), (site.hidden, site.width)))


def _made(skeleton: Skeleton, decisions: Decisions, step: Step) -> int:
    """Bytes of what a layer's experts become, and of its copy on the way to the disk."""
    most = 0
    for index, site in skeleton.sites.items():
        decision = decisions[index]
        if decision.gone is not None:
            continue
        whole = len(decision.keep) * _experts(site)
        if isinstance(step, Quantize):
            most = max(most, 3 * whole)  # int8, stacked, packed
        elif isinstance(step, LowRank) and decision.factored:
            assert decision.in_ranks is not None and decision.out_ranks is not None
            factors = rank_share(decision.in_ranks, site.first, site.hidden) + rank_share(decision.out_ranks, site.hidden, site.width)
            most = max(most, 2 * factors * skeleton.dtype.itemsize)
        else:
            most = max(most, whole * skeleton.dtype.itemsize)
    return most
