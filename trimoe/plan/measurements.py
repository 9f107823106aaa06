"""On how much text each decision of a recipe will rest, on paper: samples of what is measured on versions of the model, tokens of the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimoe.calibration.search_tokens import search_wanted
from trimoe.methods.method import Measure, Method
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.plan.outline import searched
from trimoe.recipe.recipe import Recipe
from trimoe.text.samples import num_domains
from trimoe.text.spec import CalibrationSpec
from trimoe.walk.hidden_states import samples_for
from trimoe.walk.versions import sample_bytes


@dataclass(frozen=True)
class Measurement:
    """One measurement of a step on so many `samples`; its streams take `nbytes` together at most."""

    name: str
    of: Measure
    samples: int
    nbytes: int


def of_step(skeleton: Skeleton, step: Method, sites: list[MoeBlock], spec: CalibrationSpec, tokens: int) -> list[Measurement]:
    """What a step measures on versions of the model, from `tokens` of calibration text."""
    length = min(spec.length, skeleton.context)
    sample, made = sample_bytes(skeleton, length), []
    for name, one in step.measures(skeleton, sites).items():
        samples = min(max(1, tokens // length), samples_for(one.streams, sample, num_domains(spec.sources)))
        made.append(Measurement(name, one, samples, (one.streams + 2) * samples * sample))
    return made


def on_paper(skeleton: Skeleton, recipe: Recipe, tokens: int) -> list[dict[str, Any]]:
    """A row for everything that a recipe measures: the step's number, what for, on how many tokens; and of a search by how many of them a mean expert
    is chosen, of other measurements how many versions of the model are run on how many samples."""
    sites, spec, rows = dict(skeleton.sites), recipe.calibration, []
    for number, step in enumerate(recipe.steps):
        if not step.gathers:
            continue
        rows.append({"step": number, "name": "Statistics", "tokens": tokens})
        if step.reach(sites):
            taken = searched(step, sites, recipe, tokens)
            share = min(site.rule.top_k / site.num_experts for site in sites.values())
            wanted = min(tokens, search_wanted(list(sites.values()), spec.search_tokens))
            rows.append({"step": number, "name": "Search", "tokens": taken, "wanted": wanted, "routed": int(taken * share)})
        length = min(spec.length, skeleton.context)
        for one in of_step(skeleton, step, list(sites.values()), spec, tokens):
            rows.append(
                {"step": number, "name": one.name, "tokens": one.samples * length, "samples": one.samples, "versions": one.of.streams + 1}
            )
    return rows
