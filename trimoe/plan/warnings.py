"""Warnings that save a day: what a plan says besides sizes. Few, exact; the numbers are those of LOG.md, one shot, KL in nats per token."""

from __future__ import annotations

from collections.abc import Iterator

from trimoe.methods import BlockDrop, ExpertDrop, LayerDrop, LowRank, Quantize, Step, WeightPrune
from trimoe.model.depth_config import zero_block
from trimoe.model.skeleton import Skeleton
from trimoe.recipe.recipe import Recipe
from trimoe.text.samples import BUILTIN_DOMAINS
from trimoe.text.spec import CalibrationSpec

ENOUGH = 512  # tokens an expert, on average: experts are used unevenly, and one that saw fewer than 128 is fitted to its layer's inputs

# The share that went without much harm in our runs, and what more of it did.
USUAL: dict[str, tuple[float, str]] = {
    "expert_drop": (0.25, "KL rose from 0.0075 at 25 % to 0.086 at 50 %"),
    "low_rank": (0.4, "KL rose from 0.011 at 40 % to 0.065 at 60 %"),
    "weight_prune": (0.5, "KL rose from 0.12 at 50 % to 0.83 at 70 %"),
    "layer_drop": (0.25, "KL rose from 0.16 at 25 % to 0.53 at 50 %"),
    "block_drop": (0.125, "KL rose from 0.15 at an eighth to 0.35 at a quarter"),
}

NATIVE_SOURCE = (
    "the model is in trimoe's own form, and so is the result: it loads in transformers only, and no field of the recipe changes that; "
    "for another engine compress the original."
)


def reads_text(step: Step) -> bool:
    """Whether what the step decides or fits depends on calibration text."""
    if isinstance(step, ExpertDrop):
        return bool(step.needs) or step.protect_super_experts or step.score not in ("weights", "random")
    return (
        step.calibrated
        if isinstance(step, Quantize | WeightPrune)
        else not isinstance(step, LowRank) or step.whiten == "input" or bool(step.needs)
    )


def advice(skeleton: Skeleton, recipe: Recipe, share: float, *, tokens: int, native: bool) -> list[str]:
    """`share`: of the routed-expert parameters that stay; `tokens` of calibration text."""
    found = skeleton.left_out()
    for step in recipe.steps:
        if isinstance(step, ExpertDrop) and step.total(skeleton.sites) == 0:
            experts = sum(site.num_experts for site in skeleton.sites.values())
            found.append(f"expert_drop drops nothing: {step.share(skeleton.sites):.3g} of {experts:,} routed experts is rounded to none.")
    found += _beyond(recipe, share)
    if any(isinstance(step, WeightPrune) and step.form == "dense" for step in recipe.steps):
        found.append("zeros are stored like other numbers: weight_prune makes nothing smaller (but with form: bitmask) and nothing faster.")
    if any(isinstance(step, LowRank) and step.form == "dense" for step in recipe.steps):
        found.append("low_rank with form: dense stores the products as large as before: the file gets no smaller and nothing gets faster.")
    if native and recipe.target == "transformers":
        found += _native(skeleton, recipe) if skeleton.spec is None else [NATIVE_SOURCE]
    if any(isinstance(step, Quantize) for step in recipe.steps):
        found.append(
            "4-bit experts speed up single-stream decoding (1.9 to 2.2 times here); weight-only kernels halve the speed of prefill."
            if any(isinstance(step, Quantize) and step.bits == 4 for step in recipe.steps)
            else "8-bit experts run weight-only; run trimoe bench before you count on speed."
        )
    if any(map(reads_text, recipe.steps)):
        found += [*_domains(recipe.calibration), *_amount(skeleton, tokens)]
    return found


def _beyond(recipe: Recipe, share: float) -> Iterator[str]:
    """Shares that are not usual without recovery, and what hides the harm."""
    recovered = recipe.recover is not None
    for step in recipe.steps:
        ratio = _ratio(step)
        if ratio is not None and step.name in USUAL and not recovered:
            usual, seen = USUAL[step.name]
            if ratio > usual + 1e-6:
                yield f"{step.name} of {ratio:.0%} is beyond the usual {usual:.3g}: on mini-mixtral {seen}; plan recovery (trimoe recover)."
    if share < 0.5 - 1e-3 and not recovered:
        yield f"only {share:.0%} of the expert parameters stay; beyond half, recovery training is usually needed."
    if share < 0.75 + 1e-3:
        yield "perplexity flatters here: it may look well while the model's answers change; judge by KL, agreement and tasks (trimoe eval)."


def _ratio(step: Step) -> float | None:
    if isinstance(step, WeightPrune) and step.n_of_m is not None:
        return 1 - step.n_of_m.keep / step.n_of_m.of
    if isinstance(step, ExpertDrop | LowRank | WeightPrune | LayerDrop | BlockDrop):
        return step.ratio
    return None


def _native(skeleton: Skeleton, recipe: Recipe) -> Iterator[str]:
    """What would make the result load elsewhere, and what that costs."""
    changes, dense, dropped = [], [], False
    for number, step in enumerate(recipe.steps):
        if isinstance(step, ExpertDrop) and step.counts != "uniform":
            changes.append(f"steps.{number}.counts=uniform")
        if (isinstance(step, LowRank) and step.form == "factored") or (isinstance(step, WeightPrune) and step.form == "bitmask"):
            changes.append(f"steps.{number}.form=dense")
            dense.append(step.name)
        dropped = dropped or (isinstance(step, LayerDrop) and any(zero_block(skeleton, index) is None for index in skeleton.sites))
    ways = [f"--set {' --set '.join(changes)}"] if changes else []
    ways += ["block_drop in the place of layer_drop"] if dropped else []
    if ways:
        yield f"the result loads in transformers only; vLLM, SGLang and llama.cpp would need {' and '.join(ways)}."
    if dense:
        yield (
            f"an engine that loads the dense form alone loses what {' and '.join(dense)} saves: there the matrices are as large as before. "
            "For a smaller file in such an engine drop experts (counts: uniform) or whole layers (block_drop), or quantize."
        )


def _domains(spec: CalibrationSpec) -> Iterator[str]:
    """Text of one kind alone."""
    sources, builtin = spec.sources, {f"builtin:{domain}" for domain in BUILTIN_DOMAINS}
    known = set(sources) & builtin
    if known and set(sources) <= builtin and known != builtin:
        absent = [domain for domain in BUILTIN_DOMAINS if f"builtin:{domain}" not in known]
        yield f"calibration has no {' and no '.join(absent)}: experts that only such text uses look idle and go first; builtin:mixed has all three."
    elif len(sources) == 1 and not sources[0].startswith("builtin:"):
        yield f"calibration is one text ({sources[0]}): experts that other kinds of text use look idle; name a text for each kind you serve."


def _amount(skeleton: Skeleton, tokens: int) -> Iterator[str]:
    """Too few tokens for every expert to be known."""
    scarce = {index: tokens * site.rule.top_k / site.num_experts for index, site in skeleton.sites.items()}
    least = min(scarce.values())
    if least < ENOUGH:
        wanted = -(-ENOUGH * tokens // max(1, int(least)))
        yield f"{tokens:,} calibration tokens are {least:,.0f} an expert on average; kept sets may be unstable below {ENOUGH}: take {wanted:,}."
