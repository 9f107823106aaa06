"""How often a recipe goes through the model, over how much text, and the bytes that each pass reads and writes: counted, not estimated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trimoe.methods.method import Method, last_label
from trimoe.model.decision import Decisions, decided_sites, kept_layers
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.plan import measurements
from trimoe.plan.outline import Outline
from trimoe.recipe.recipe import Recipe


@dataclass(frozen=True)
class Pass:
    """So many passes over the model at one stage: `tokens` of text in each, which `versions` of the model read side by side; bytes of
    tensors that are read and written in all of them together (of a training neither is counted: the model stays in memory, or lies in
    files that the system keeps)."""

    stage: str
    passes: int
    tokens: int
    versions: int = 1
    read_bytes: int | None = None
    written_bytes: int | None = None


def passes(skeleton: Skeleton, recipe: Recipe, tokens: int) -> list[dict[str, Any]]:
    """Return a row for every stage of a run that nothing interrupts, in the order of the run. Where it is open which layers go, the most
    that are read and written stand there. Every process of a team reads as much; together they write as much."""
    made: list[Pass] = []
    many = len(recipe.steps) > 1
    for number, step in enumerate(recipe.steps):
        before = Outline(skeleton, replace(recipe, steps=recipe.steps[:number], recover=None), largest=True).decisions
        made += [
            replace(row, stage=f"{row.stage}, step {number + 1}" if many else row.stage)
            for row in _deciding(skeleton, recipe, step, before, tokens)
        ]
    made.append(_writing(skeleton, recipe, tokens))
    if recipe.recover is not None:
        spec = recipe.recover
        made.append(Pass("Training", spec.epochs, spec.samples * min(spec.length, skeleton.context)))
    return [row.__dict__ for row in made]


def _deciding(skeleton: Skeleton, recipe: Recipe, step: Method, before: Decisions, tokens: int) -> list[Pass]:
    if not step.gathers:
        return []
    layers, spec = kept_layers(skeleton, before), recipe.calibration
    made = [Pass("Statistics", 1, tokens, read_bytes=_walk(skeleton, layers), written_bytes=0)]
    sites = list(decided_sites(skeleton.sites, before).values())
    length = min(spec.length, skeleton.context)
    for one in measurements.of_step(skeleton, step, sites, spec, tokens):
        rounds, each = one.of.rounds, _walk(skeleton, layers) + (_ends(skeleton, "embeddings") if one.of.to_the_end else 0)
        made.append(Pass(one.name, rounds, one.samples * length, one.of.streams + 1, rounds * each, 0))
    return made


def _writing(skeleton: Skeleton, recipe: Recipe, tokens: int) -> Pass:
    """The last walk: layers that are fitted run on the text, what stays as it is gets copied."""
    decisions = Outline(skeleton, replace(recipe, recover=None), largest=True).decisions
    layout = Layout(skeleton, decisions)
    fitted = any(step.calibrated for step in recipe.steps)
    computed = [i for i in layout.place if (d := decisions.get(i)) and (d.changed or (d.gone is None and d.in_ranks is not None))]
    loaded = list(layout.place) if computed and fitted else computed
    copied = sum(skeleton.checkpoint.tensors[entry.source].nbytes for group in layout.groups for entry in group if entry.source is not None)
    read = copied + (_walk(skeleton, loaded) if computed else 0)
    return Pass(last_label(recipe.steps), 1, tokens if computed and fitted else 0, read_bytes=read, written_bytes=layout.tensor_bytes)


def _walk(skeleton: Skeleton, layers: list[int]) -> int:
    """Bytes that a walk reads: its layers, and what lies outside them but for the output head."""
    sizes = skeleton.checkpoint.tensors
    return sum(sizes[key].nbytes for index in layers for key in skeleton.keys_by_layer[index]) + _ends(skeleton, "head")


def _ends(skeleton: Skeleton, without: str) -> int:
    """Bytes outside the layers, but for the embeddings or the head where these are two tables (LayerWalk loads the other)."""
    model = skeleton.model
    left_out = model.get_input_embeddings() if without == "embeddings" else model.get_output_embeddings()
    tied = {*skeleton.ties, *skeleton.ties.values()}
    names = {f"{name}.weight" for name, module in model.named_modules() if module is left_out} - tied
    keys = {key for name in names for key in skeleton.source_keys(name)}
    return sum(skeleton.checkpoint.tensors[key].nbytes for key in skeleton.outer_keys if key not in keys)
