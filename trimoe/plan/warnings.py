"""Warnings that save a day: what a plan says besides sizes. Few, exact; the numbers are those of LOG.md, one shot, KL in nats per token."""

from __future__ import annotations

from collections.abc import Iterator

from trimoe.methods.method import Topic
from trimoe.model.skeleton import Skeleton
from trimoe.recipe.recipe import Recipe
from trimoe.text.samples import BUILTIN_DOMAINS
from trimoe.text.spec import CalibrationSpec

ENOUGH = 512  # tokens an expert, on average: experts are used unevenly, and one that saw fewer than 128 is fitted to its layer's inputs

NATIVE_SOURCE = (
    "the model is in trimoe's own form, and so is the result: it loads in transformers only, and no field of the recipe changes that; "
    "for another engine compress the original."
)


def advice(skeleton: Skeleton, recipe: Recipe, share: float, *, tokens: int, native: bool) -> list[str]:
    """`share`: of the routed-expert parameters that stay; `tokens` of calibration text."""
    found = skeleton.left_out()
    cautions = [step.cautions(skeleton.sites) for step in recipe.steps]

    def said(topic: Topic) -> list[str]:
        return [words[topic] for words in cautions if topic in words]

    found += [*said("amount"), *_beyond(recipe, share)]
    found += reversed(said("stored"))  # what is stored is first of all what the last step leaves
    if native and recipe.target == "transformers":
        found += _native(skeleton, recipe) if skeleton.spec is None else [NATIVE_SOURCE]
    found += said("speed")
    if recipe.reads_text:
        found += [*_domains(recipe.calibration), *_amount(skeleton, tokens)]
    return found


def _beyond(recipe: Recipe, share: float) -> Iterator[str]:
    """Shares that are not usual without recovery, and what hides the harm."""
    recovered = recipe.recover is not None
    for step in recipe.steps:
        if step.amount is not None and step.usual is not None and not recovered:
            usual, seen = step.usual
            if step.amount > usual + 1e-6:
                yield f"{step.name} of {step.amount:.0%} is beyond the usual {usual:.3g}: on mini-mixtral {seen}; plan recovery (trimoe recover)."
    if share < 0.5 - 1e-3 and not recovered:
        yield f"only {share:.0%} of the expert parameters stay; beyond half, recovery training is usually needed."
    if share < 0.75 + 1e-3:
        yield "perplexity flatters here: it may look well while the model's answers change; judge by KL, agreement and tasks (trimoe eval)."


def _native(skeleton: Skeleton, recipe: Recipe) -> Iterator[str]:
    """What would make the result load elsewhere, and what that costs."""
    changes = [f"steps.{n}.{name}={value}" for n, step in enumerate(recipe.steps) for name, value in step.stock_settings.items()]
    dense = [step.name for step in recipe.steps if "form" in step.stock_settings]
    others = {step.name: other for step in recipe.steps if (other := step.stock_method(skeleton)) is not None}
    ways = [f"--set {' --set '.join(changes)}"] if changes else []
    ways += [f"{other} in the place of {name}" for name, other in others.items()]
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
