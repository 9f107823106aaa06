"""On how much text each decision of a recipe will rest, on paper: samples of what is measured on versions of the model, tokens of the search."""

from __future__ import annotations

from dataclasses import dataclass

from trimoe import receptive_field, sensitivity
from trimoe.calibration import num_domains
from trimoe.methods import BlockDrop, ExpertDrop, LayerDrop, Step
from trimoe.recipe import CalibrationSpec
from trimoe.site import Site
from trimoe.skeleton import Skeleton
from trimoe.spill import samples_for
from trimoe.variants import sample_bytes


@dataclass(frozen=True)
class Measurement:
    """One measurement on versions of a model: so many `streams` of hidden states, on so many `samples`, `nbytes` together at most."""

    name: str
    streams: int
    samples: int
    nbytes: int


def of_step(skeleton: Skeleton, step: Step, sites: list[Site], spec: CalibrationSpec, tokens: int) -> list[Measurement]:
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


def dropped_parts(skeleton: Skeleton, step: LayerDrop | BlockDrop, sites: list[Site]) -> int:
    """How many layers or sub-layers go."""
    parts = len(sites) if isinstance(step, LayerDrop) else len(skeleton.layers)
    return step.count if step.count is not None else round((step.ratio or 0) * parts)
