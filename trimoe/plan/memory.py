"""How much memory a recipe takes, stage by stage, at most: one decoder layer, what is made beside it, and what is carried from layer to layer.

These are bounds, counted from shapes; log/memory.md has measurements beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trimoe.calibration.search_tokens import gram_bytes, most_held, search_budget
from trimoe.errors import UserError
from trimoe.methods.method import Method
from trimoe.model.decision import Decisions, unchanged
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import LOGITS, Skeleton
from trimoe.plan import limits, measurements, recovery_memory
from trimoe.plan.limits import IMPORTS
from trimoe.recipe.recipe import Recipe
from trimoe.recipe.recover import Recover
from trimoe.show.format import human
from trimoe.text.samples import batch_tokens
from trimoe.text.spec import CalibrationSpec
from trimoe.walk.hidden_states import BUDGET, streams_budget, wider

TABLES = 5  # of logits, in float32, that are held at once where versions are compared


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of each stage: on the host, and on a GPU where one computes (else none)."""

    host: dict[str, int]
    device: dict[str, int]

    def short(self, device: str, processes: int = 1) -> list[str]:
        """A sentence for the host and for the device if it has less memory than the largest stage takes there; of so many `processes` on this
        machine, each takes that of the host."""
        has = {"this machine": (self.host, limits.host() // processes), f"the device {device}": (self.device, limits.device(device))}
        said = []
        for where, (stages, there) in has.items():
            if there is not None and stages and max(stages.values()) > there:
                stage = max(stages, key=lambda name: stages[name])
                each = f" for each of {processes} processes" if processes > 1 and stages is self.host else ""
                said.append(
                    f"the {stage} stage takes up to {human(stages[stage])} of memory, {where} has {human(there)}{each}: {LESS[stage]}"
                )
        return said

    def refuse(self, device: str, processes: int = 1) -> None:
        """Raise UserError where there is less memory than that."""
        for words in self.short(device, processes):
            raise UserError(f"{words[0].upper()}{words[1:]}; or begin all the same with --any-memory (any_memory=True).")


LESS = {  # what makes a stage smaller, for people
    "statistics": "take fewer calibration samples, a smaller calibration.search_memory, or --dtype bfloat16",
    "measuring": "take --dtype bfloat16, or counts, search and rank that measure nothing on the model",
    "writing": "take --dtype bfloat16",
    "evaluation": "take --dtype bfloat16",
    "recovery": "take dtype: bfloat16, a smaller batch or length, adapters or router in the place of all weights "
    "(their layers are read one at a time where the model does not fit), or method: experts",
}


def of_stages(skeleton: Skeleton, recipe: Recipe, decisions: Decisions, tokens: int, parameters: int, device: str) -> PeakMemory:
    """What each stage takes at its peak. `decisions`: final ones, or stand-ins of the right sizes; `parameters`: the result's."""
    found, apart = PeakMemory({}, {}), device.startswith("cuda")
    stages = list(_stages(skeleton, recipe, decisions, tokens, device))
    if recipe.recover is not None:
        whole = recovery_memory.weights(skeleton)
        streamed = bool(recipe.recover.stream)
        stages.append(
            ("recovery", *recovery_memory.peak(skeleton, recipe.recover, device, parameters=parameters, original=whole, streamed=streamed))
        )
    for name, computed, kept, passed in stages:
        for held, size in ((found.host, IMPORTS + kept + (passed if apart else computed)), (found.device, computed)):
            if held is found.host or apart:
                held[name] = max(held.get(name, 0), size)
    return found


def of_statistics(skeleton: Skeleton, recipe: Recipe, tokens: int, device: str) -> PeakMemory:
    """What gathering a recipe's first statistics alone takes."""
    found = of_stages(skeleton, recipe, unchanged(skeleton.sites), tokens, 0, device)
    return PeakMemory(*({name: size for name, size in held.items() if name == "statistics"} for held in (found.host, found.device)))


def of_recovery(skeleton: Skeleton, spec: Recover, device: str, parameters: int, original: int, streamed: bool) -> PeakMemory:
    """What training takes; all as for recovery_memory.peak."""
    computed, kept, passed = recovery_memory.peak(skeleton, spec, device, parameters=parameters, original=original, streamed=streamed)
    apart = device.startswith("cuda")
    return PeakMemory({"recovery": IMPORTS + kept + (passed if apart else computed)}, {"recovery": computed} if apart else {})


def fitting(skeleton: Skeleton, spec: Recover, device: str, parameters: int, original: int) -> tuple[PeakMemory, str | None]:
    """What training takes in the form that is taken. The model is held as a whole unless the spec says otherwise; where that
    does not fit, and reading layers as they run does, that is done, and a sentence says so."""
    held = of_recovery(skeleton, spec, device, parameters, original, bool(spec.stream))
    if spec.stream is not None or not recovery_memory.can_stream(skeleton, spec) or not held.short(device):
        return held, None
    less = of_recovery(skeleton, spec, device, parameters, original, True)
    if less.short(device):
        return held, None
    whole, part = (max({**one.host, **one.device}.values()) for one in (held, less))
    return less, (
        f"recovery with the whole model in memory takes up to {human(whole)}, more than there is; its layers are read from the "
        f"files as they run, which takes up to {human(part)}, and longer"
    )


def of_training(student: Skeleton, teacher: Skeleton | None, spec: Recover, device: str) -> tuple[PeakMemory, str | None]:
    """What the recovery of a finished folder takes, as `fitting` has it."""
    parameters = recovery_memory.weights(student)
    return fitting(student, spec, device, parameters, parameters if teacher is None else recovery_memory.weights(teacher))


def of_evaluation(skeleton: Skeleton, device: str) -> PeakMemory:
    """What a model takes that is walked layer by layer, at least: its largest layer, or what lies outside the layers."""
    outside = sum(math.prod(skeleton.checkpoint.tensors[key].shape) for key in skeleton.outer_keys) * skeleton.dtype.itemsize
    computed, apart = max(outside, skeleton.largest_layer), device.startswith("cuda")
    return PeakMemory({"evaluation": IMPORTS + (0 if apart else computed)}, {"evaluation": computed} if apart else {})


def _stages(skeleton: Skeleton, recipe: Recipe, decisions: Decisions, tokens: int, device: str) -> Iterator[tuple[str, int, int, int]]:
    """A stage's name and bytes: of what is computed with, on the device; of what is kept on the host; and of what passes through the host on the
    way to a device, where that is another."""
    wide, together = batch_tokens(device), LOGITS * wider(device)  # tokens of a batch, and logits that are held at once
    site, item = max(skeleton.sites.values(), key=lambda site: site.num_experts * site.width), skeleton.dtype.itemsize
    hidden = min(BUDGET, site.hidden * tokens * item)
    outside = sum(math.prod(skeleton.checkpoint.tensors[key].shape) for key in skeleton.outer_keys) * item
    staging, cut = _staging(skeleton), _cut(skeleton, decisions)
    batch = _batch(site, min(tokens, max(wide, min(recipe.calibration.length, skeleton.context))), item)
    masks = masks_of(skeleton, recipe.calibration, tokens)
    kept = 0  # statistics of all layers; a file of them that is given stays until the end
    for step in recipe.steps:
        if not step.gathers:
            continue
        layer = skeleton.largest_layer + (staging if step is recipe.steps[0] else max(staging, cut))
        kept = max(
            kept, _grams(skeleton, step, recipe, tokens) + int(1.5 * _sums(skeleton, step))
        )  # of sums, which are gathered in pieces, then joined
        recorded = hidden + step.fit_bytes(site) if "spectra" in step.needs else 0
        recorded = max(recorded, _candidates(skeleton, step, recipe, tokens))  # one after the other
        yield "statistics", masks + max(outside + hidden - kept, layer + batch + hidden + recorded), kept, staging
        measured = measurements.of_step(skeleton, step, list(skeleton.sites.values()), recipe.calibration, tokens)
        if measured:
            logits = TABLES * 4 * min(together, wide * skeleton.config.get_text_config().vocab_size)
            streams = min(streams_budget(skeleton.largest_layer, torch.device(device)), max(one.nbytes for one in measured))
            few = max(one.samples for one in measured) * min(recipe.calibration.length, skeleton.context)
            masked = masks_of(skeleton, recipe.calibration, few)
            yield "measuring", masked + streams + max(layer + batch, outside + logits), kept, staging
    last = [step for step in recipe.steps if step.label is not None]
    if not last:
        largest = 2 * max(info.nbytes for info in skeleton.checkpoint.tensors.values())  # a stack is read to be cut
        yield "writing", 0, kept + largest, 0
        return
    fitted = any(step.records for step in last)
    recorded = 2 * hidden + batch if fitted else 0
    made = sum(_made(skeleton, decisions, step) for step in last)
    beside = max(staging, cut, made + max(step.fit_bytes(site) for step in last))
    masked = masks if fitted else 0
    yield "writing", masked + max(outside + hidden - kept, recorded + skeleton.largest_layer + beside), kept, max(staging, cut, made)


def masks_of(skeleton: Skeleton, spec: CalibrationSpec, tokens: int) -> int:
    """Return the bytes of the masks that keep documents apart in so many tokens: L x L of every sample for each kind of attention,
    for the whole walk. None are kept where documents are joined."""
    if spec.packing != "separate":
        return 0
    kinds = len(set(getattr(skeleton.config.get_text_config(), "layer_types", None) or [None]))
    # by eager attention numbers that are added, by others true and false
    item = skeleton.dtype.itemsize if skeleton.model.config._attn_implementation == "eager" else 1
    return tokens * min(spec.length, skeleton.context) * kinds * item


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


def _cut(skeleton: Skeleton, decisions: Decisions) -> int:
    """Bytes of the larger stack of those experts that stay, while the whole stack is still there."""
    cuts = [
        len(decisions[index].keep) * max(site.first, site.width) * site.hidden
        for index, site in skeleton.sites.items()
        if decisions[index].gone is None and len(decisions[index].keep) < site.num_experts
    ]
    return max(cuts, default=0) * skeleton.dtype.itemsize


def _batch(site: MoeBlock, tokens: int, item: int) -> int:
    """Bytes of what one batch leaves behind in a layer: in attention, all experts' outputs twice, and one expert's share if it had every token."""
    return tokens * item * ((8 + 2 * site.rule.top_k) * site.hidden + 2 * (site.hidden + site.first + site.width))


def _grams(skeleton: Skeleton, step: Method, recipe: Recipe, tokens: int) -> int:
    """Bytes of search tokens in memory: of all layers up to a budget, and of the one layer that is searched, which may lie in a file."""
    every, reach, spec = list(skeleton.sites.values()), step.reach(skeleton.sites), recipe.calibration
    count = min(tokens, search_budget(every, reach, spec.search_tokens, spec.search_memory))
    whole, most = count * gram_bytes(every, reach), count * max(gram_bytes([site], reach) for site in every)
    return whole if whole <= BUDGET else BUDGET + most


def _candidates(skeleton: Skeleton, step: Method, recipe: Recipe, tokens: int) -> int:
    """Bytes of what one layer's search tokens are chosen from: inputs and logits of some tokens, the experts of all."""
    sites = list(skeleton.sites.values())
    count = min(
        tokens, search_budget(sites, step.reach(skeleton.sites), recipe.calibration.search_tokens, recipe.calibration.search_memory)
    )
    if not count:
        return 0
    return max(
        most_held(tokens, site.num_experts, count) * (site.hidden * skeleton.dtype.itemsize + 4 * site.num_experts + 8 * site.rule.top_k)
        + 5 * 8 * tokens * site.rule.top_k  # pairs of tokens and experts, and what orders them
        for site in sites
    )


def _sums(skeleton: Skeleton, step: Method) -> int:
    """Bytes of all layers' statistics in float64, search tokens aside."""
    total = 0
    for site in skeleton.sites.values():
        total += 2 * site.num_experts**2 + site.num_experts * (3 * site.hidden + 2 * site.width)
        if "spectra" in step.needs:
            total += site.num_experts * (min(site.first, site.hidden) + min(site.hidden, site.width))
    return 8 * total


def _made(skeleton: Skeleton, decisions: Decisions, step: Method) -> int:
    """Bytes of what a layer's experts become, at most, and of its copy on the way to the disk."""
    left = [(site, decisions[index]) for index, site in skeleton.sites.items() if decisions[index].gone is None]
    return max((step.made_bytes(site, decision, skeleton.dtype.itemsize) for site, decision in left), default=0)
