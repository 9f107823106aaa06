"""The last walk: each layer is changed on the hidden states it is given, and written.

Low-rank factors are fitted to the inputs of the *unfactored* model: that was better on every model and ratio tried (LOG.md). Integers
and zeros are fitted progressively, to what the changed layers before give (and so are factors, where their product is changed in one recipe).
A resumed run reads the layers that it wrote back, so nothing is done twice. Of a team each process carries its stretch of the batches and
changes its share of each layer's experts; the main process writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from trimoe.calibration.statistics import added
from trimoe.checkpoint.headers import DTYPES
from trimoe.journal import Journal
from trimoe.methods.fitting import LayerFit
from trimoe.methods.lab import Lab
from trimoe.methods.method import last_label
from trimoe.model import transformers5
from trimoe.model.decision import Decisions, kept_layers
from trimoe.model.moe_block import MoeBlock, tensor_at
from trimoe.modeling_trimoe import first_projection
from trimoe.output.writer import Writer
from trimoe.walk.decided import prune_layer
from trimoe.walk.expert_inputs import FEW, InputRecorder, LayerInputs
from trimoe.walk.expert_shards import share
from trimoe.walk.linear_inputs import Inputs
from trimoe.walk.walk import LayerWalk


@torch.no_grad()
def transform(run: Lab, decisions: Decisions, writer: Writer, journal: Journal) -> dict[str, Any]:
    """Write all groups: 0 is what lies outside the layers, then one a layer. Where nothing is computed, all of it is a copy. Returns what
    is worth knowing about it, by step."""
    steps = [step for step in run.steps if step.label is not None]
    change = next((step for step in reversed(steps) if step.progressive), None)
    left = kept_layers(run.skeleton, decisions)
    computed = [i for i in left if (d := decisions.get(i)) and (d.changed or (d.gone is None and d.in_ranks is not None))]
    done = set(run.team.from_main(lambda: [group for group in range(len(run.skeleton.layers) + 1) if writer.done(group)]))
    _put(run, writer, 0)
    fitted = any(step.calibrated for step in steps)
    walk = None
    if computed and not all(index + 1 in done for index in computed):
        walk = LayerWalk(run.skeleton, run.own if fitted else [], device=run.device)
    for index in run.reporter.track(
        range(len(run.skeleton.layers)),
        last_label(steps),
        len(run.skeleton.layers),
        tokens=walk.share if walk is not None and fitted else None,
    ):
        if walk is None or index not in left or (index not in computed and not fitted):
            _put(run, writer, index + 1)
            continue
        with walk.layer(index) as layer:
            site = prune_layer(run.skeleton, index, layer, decisions)
            if index not in computed:
                walk.advance(index, layer)
                _put(run, writer, index + 1)
                continue
            if index + 1 in done:
                if change is not None:
                    dense = run.team.from_main(partial(writer.layout.read_back, index, writer.out))
                    transformers5.load_into(run.skeleton.model, dense, walk.device, run.skeleton.dtype)
                walk.advance(index, layer)
                continue
            given = _watched(run, walk, index, layer, site, decisions[index].linears, progressive=change is not None)
            about, made = _fitted(run, writer, index, layer, site, given)
            if change is not None:
                journal.put(f"changed-{index}", about)
            _put(run, writer, index + 1, partial(writer.layout.form, index, layer, made))
            if change is not None:
                walk.advance(index, layer)
            del given, made  # not beside the next layer
    if change is None:
        return {}
    known = {str(i): journal.get(f"changed-{i}") or {} for i in computed}
    borrowed = sum(about.get("borrowed", 0) for about in known.values())
    if borrowed:
        run.reporter.say(f"{borrowed} experts saw fewer than {FEW} tokens and were fitted to their layer's inputs instead.")
    found: dict[str, Any] = {"layers": known}
    if any(decision.bits is not None for decision in decisions.values()):
        found["quantized_share"] = writer.layout.quantized_share
    return {change.name: found}


def _fitted(
    run: Lab, writer: Writer, index: int, layer: nn.Module, site: MoeBlock | None, given: tuple[LayerInputs | None, Inputs | None]
) -> tuple[dict[str, Any], Any]:
    """One layer's matrices, changed by one step after the other: what is recorded of it, and what the last step made."""
    layout, (seen, inputs) = writer.layout, given
    decision, steps = layout.decisions[index], [step for step in run.steps if step.label is not None]

    def stored(path: str | None) -> torch.dtype:
        return DTYPES[layout.expert_dtype(index, run.skeleton.sites[index]) if path is None else layout.linear_dtype(index, path)]

    part = None
    if site is not None:
        divide = all(step.divides for step in steps)
        part = share(run.team, site.experts_of(layer), site, seen, run.first, run.tokens, divide=divide)
    weights = {path: tensor_at(layer, f"{path}.weight") for path in decision.linears}
    moments = {path: None if inputs is None else inputs.moment(path) for path in weights}
    fit = LayerFit(run.team, decision, part, weights, moments, stored)
    about: dict[str, Any] = {}
    made = None
    for step in steps:
        made, more = step.fit(fit)
        about |= more
    if decision.pruned:  # what the next layers see is what is written: a resumed run reads it back
        for path, weight in weights.items():
            weight.copy_(weight.to(stored(path)))
        for parameter in (first_projection(part.whole), part.whole.down_proj) if part is not None else ():
            parameter.copy_(parameter.to(stored(None)))
    return about, made


def _put(run: Lab, writer: Writer, group: int, made: Callable[[], Mapping[str, torch.Tensor]] | None = None) -> None:
    """Write one group, in the main process."""
    if run.team.main:
        writer.put(group, made() if made is not None else None)


def _watched(
    run: Lab, walk: LayerWalk, index: int, layer: nn.Module, site: MoeBlock | None, linears: tuple[str, ...], *, progressive: bool
) -> tuple[LayerInputs | None, Inputs | None]:
    """What the layer's experts (here) and linears (in all processes) are given, as the layers before leave it. Where the fit is not
    progressive, the batches go through the layer with that."""
    if not walk.batches:
        if not progressive:
            walk.advance(index, layer)
        return None, None
    recorder, inputs = InputRecorder(sum(batch.numel() for batch in walk.batches)), Inputs(layer, linears)
    with ExitStack() as stack:
        stack.enter_context(inputs.attached())
        if site is not None:
            stack.enter_context(recorder.attached(layer, site))
            if progressive:
                stack.enter_context(_without_experts(layer, site))
        if progressive:
            for batch, hidden in enumerate(walk.hidden):
                walk.step(index, layer, hidden, batch)
            walk.check(index)
        else:
            walk.advance(index, layer)
    if run.team.count > 1 and linears:
        sums = run.team.fold([{path: total.cpu() for path, total in inputs.sums.items()}], added)
        inputs.sums = {path: total.to(walk.device) for path, total in sums.items()}
        everyones = run.team.everyone(inputs.tokens)
        inputs.tokens = {path: sum(tokens[path] for tokens in everyones) for path in sums}
    return recorder.seen() if site is not None else None, inputs


class _without_experts:
    """The layer runs up to its experts, which are shown their inputs and give zeros: what they would give is not wanted yet."""

    def __init__(self, layer: nn.Module, site: MoeBlock):
        self.experts: Any = site.experts_of(layer)

    def __enter__(self) -> None:
        self.forward: Callable[..., torch.Tensor] = self.experts.forward
        self.experts.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)

    def __exit__(self, *error: object) -> None:
        del self.experts.forward
