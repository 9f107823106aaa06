"""On how much text each decision of a recipe will rest, on paper: samples of what is measured on versions of the model, tokens of the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimoe.calibration.search_tokens import search_wanted
from trimoe.methods import BlockDrop, ExpertDrop, LayerDrop, Step
from trimoe.methods.expert_drop import receptive_field
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.plan.outline import searched
from trimoe.recipe.recipe import Recipe
from trimoe.text.samples import num_domains
from trimoe.text.spec import CalibrationSpec
from trimoe.walk import sensitivity
from trimoe.walk.hidden_states import samples_for
from trimoe.walk.versions import sample_bytes


@dataclass(frozen=True)
class Measurement:
    """One measurement on versions of a model: so many `streams` of hidden states, on so many `samples`, `nbytes` together at most."""

    name: str
    streams: int
    samples: int
    nbytes: int


def of_step(skeleton: Skeleton, step: Step, sites: list[MoeBlock], spec: CalibrationSpec, tokens: int) -> list[Measurement]:
    """What a step measures on versions of the model, from `tokens` of calibration text."""
    wanted = {}
    if "sensitivity" in step.needs or (isinstance(step, ExpertDrop) and step.counts == "optimal"):
        wanted["Sensitivity"] = sensitivity.streams([site.layer for site in sites], skeleton.dtype)
    if isinstance(step, ExpertDrop) and step.receptive_field is not None:
        wanted["Receptive field"] = receptive_field.streams(step.receptive_field)
    if isinstance(step, LayerDrop | BlockDrop) and step.rerank == "kl" and step.threshold is None:
        wanted["Rerank"] = 2 * dropped_parts(skeleton, step, sites) + 3
    length = min(spec.length, skeleton.context)
    sample, made = sample_bytes(skeleton, length), []
    for name, streams in wanted.items():
        samples = min(max(1, tokens // length), samples_for(streams, sample, num_domains(spec.sources)))
        made.append(Measurement(name, streams, samples, (streams + 2) * samples * sample))
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
                {"step": number, "name": one.name, "tokens": one.samples * length, "samples": one.samples, "versions": one.streams + 1}
            )
    return rows


def dropped_parts(skeleton: Skeleton, step: LayerDrop | BlockDrop, sites: list[MoeBlock]) -> int:
    """How many layers or sub-layers go."""
    parts = len(sites) if isinstance(step, LayerDrop) else len(skeleton.layers)
    return step.count if step.count is not None else round((step.ratio or 0) * parts)
