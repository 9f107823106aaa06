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
from trimoe.methods import LowRank, Quantize, WeightPrune
from trimoe.methods.fitting import factored, pruned, quantized
from trimoe.methods.lab import Lab
from trimoe.methods.quantize.quantize import QuantizedLayer, put_back
from trimoe.model import transformers5
from trimoe.model.decision import Decisions, LayerDecision, kept_layers
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
    factor = next((step for step in run.steps if isinstance(step, LowRank)), None)
    change = next((step for step in run.steps if isinstance(step, Quantize | WeightPrune)), None)
    left = kept_layers(run.skeleton, decisions)
    computed = [i for i in left if (d := decisions.get(i)) and (d.changed or (d.gone is None and d.in_ranks is not None))]
    done = set(run.team.from_main(lambda: [group for group in range(len(run.skeleton.layers) + 1) if writer.done(group)]))
    _put(run, writer, 0)
    label = f"{change.label} and write" if change else "Factor and write" if factor else "Write"
    fitted = any(step is not None and step.calibrated for step in (factor, change))
    walk = None
    if computed and not all(index + 1 in done for index in computed):
        walk = LayerWalk(run.skeleton, run.own if fitted else [], device=run.device)
    for index in run.reporter.track(
        range(len(run.skeleton.layers)), label, len(run.skeleton.layers), tokens=walk.share if walk is not None and fitted else None
    ):
        if walk is None or index not in left or (index not in computed and not fitted):
            _put(run, writer, index + 1)
            continue
        with walk.layer(index) as layer:
            site = prune_layer(run.skeleton, index, layer, decisions)
            if index not in computed:
                walk.advance(index, layer)
                _put(run, writer, index + 1)
            elif change is not None and index + 1 in done:
                dense = run.team.from_main(partial(writer.layout.read_back, index, writer.out))
                transformers5.load_into(run.skeleton.model, dense, walk.device, run.skeleton.dtype)
                walk.advance(index, layer)
            elif change is not None:
                _change(run, walk, index, layer, site, decisions[index], writer, journal, factor, change)
            elif index + 1 in done:
                walk.advance(index, layer)
            else:
                assert factor is not None and site is not None
                recorder = InputRecorder(sum(batch.numel() for batch in walk.batches))
                with recorder.attached(layer, site):
                    walk.advance(index, layer)
                part = share(run.team, site.experts_of(layer), site, recorder.seen() if walk.batches else None, run.first, run.tokens)
                new = factored(part, factor, decisions[index])
                _put(run, writer, index + 1, partial(_factored_form, writer, site, index, new))
                del recorder, part, new  # not beside the next layer
    if change is None:
        return {}
    known = {str(i): journal.get(f"changed-{i}") or {} for i in computed}
    borrowed = sum(about.get("borrowed", 0) for about in known.values())
    if borrowed:
        run.reporter.say(f"{borrowed} experts saw fewer than {FEW} tokens and were fitted to their layer's inputs instead.")
    about: dict[str, Any] = {"layers": known}
    if isinstance(change, Quantize):
        about["quantized_share"] = writer.layout.quantized_share
    return {change.name: about}


def _change(
    run: Lab, walk: LayerWalk, index: int, layer: nn.Module, site: MoeBlock | None, decision: LayerDecision, writer: Writer, journal: Journal,
    factor: LowRank | None, change: Quantize | WeightPrune,
) -> None:  # fmt: skip
    """One layer's matrices to integers or with zeros (their product of factors, where they were factored before), and the batches through
    them."""
    seen, inputs = _watched(run, walk, index, layer, site, decision.linears) if walk.batches else (None, None)
    part = None
    if site is not None:
        whole = isinstance(change, WeightPrune) and change.compare == "layer"
        part = share(run.team, site.experts_of(layer), site, seen, run.first, run.tokens, divide=not whole)
        if decision.in_ranks is not None:
            assert factor is not None
            factored(part, factor, decision)
    weights = {path: tensor_at(layer, f"{path}.weight") for path in decision.linears}
    moments = {path: None if inputs is None else inputs.moment(path) for path in weights}
    if isinstance(change, Quantize):
        group, packed = decision.group or 0, QuantizedLayer()
        if part is not None:
            packed = quantized(part, change, group, DTYPES[writer.layout.expert_dtype(index, run.skeleton.sites[index])])

        def rounded(path: str) -> Any:
            return change.linear(weights[path], moments[path], group, DTYPES[writer.layout.linear_dtype(index, path)])  # type: ignore[call-arg]

        packed.linears |= dict(zip(weights, run.team.shared(list(weights), rounded), strict=True))
        for path, weight in weights.items():
            weight.copy_(packed.linears[path].dense())
        journal.put(f"changed-{index}", {"borrowed": packed.borrowed})
        _put(run, writer, index + 1, lambda: writer.layout.packed_form(index, packed))
        if part is not None:
            put_back(part.whole, packed)
    else:
        about = pruned(part, change) if part is not None else {}

        def thinned(path: str) -> torch.Tensor:
            change.linear(weights[path], moments[path])  # type: ignore[call-arg]
            return weights[path]

        for weight, made in zip(weights.values(), run.team.shared(list(weights), thinned), strict=True):
            weight.copy_(made)
        stored = {path: writer.layout.linear_dtype(index, path) for path in weights}
        for path, weight in weights.items():
            weight.copy_(weight.to(DTYPES[stored[path]]))  # what the next layers see is what is written: a resumed run reads it back
        if part is not None:
            dtype = DTYPES[writer.layout.expert_dtype(index, run.skeleton.sites[index])]
            for parameter in (first_projection(part.whole), part.whole.down_proj):
                parameter.copy_(parameter.to(dtype))
        journal.put(f"changed-{index}", about)
        _put(run, writer, index + 1, lambda: writer.layout.pruned_form(index, layer))
    walk.advance(index, layer)


def _put(run: Lab, writer: Writer, group: int, made: Callable[[], Mapping[str, torch.Tensor]] | None = None) -> None:
    """Write one group, in the main process."""
    if run.team.main:
        writer.put(group, made() if made is not None else None)


def _watched(
    run: Lab, walk: LayerWalk, index: int, layer: nn.Module, site: MoeBlock | None, linears: tuple[str, ...]
) -> tuple[LayerInputs | None, Inputs]:
    """What the layer's experts (here) and linears (in all processes) are given, as the layers before leave it."""
    recorder, inputs = InputRecorder(sum(batch.numel() for batch in walk.batches)), Inputs(layer, linears)
    with ExitStack() as stack:
        stack.enter_context(inputs.attached())
        if site is not None:
            stack.enter_context(recorder.attached(layer, site))
            stack.enter_context(_without_experts(layer, site))
        for batch, hidden in enumerate(walk.hidden):
            walk.step(index, layer, hidden, batch)
    walk.check(index)
    if run.team.count > 1 and linears:
        sums = run.team.fold([{path: total.cpu() for path, total in inputs.sums.items()}], added)
        inputs.sums = {path: total.to(walk.device) for path, total in sums.items()}
        everyones = run.team.everyone(inputs.tokens)
        inputs.tokens = {path: sum(tokens[path] for tokens in everyones) for path in sums}
    return recorder.seen() if site is not None else None, inputs


def _factored_form(writer: Writer, site: MoeBlock, index: int, new: nn.Module) -> dict[str, torch.Tensor]:
    made = {f"{site.block}.{site.experts}.{name}": tensor_at(new, name).detach() for name in writer.layout.made(index)}
    return writer.layout.disk_form(index, made)


class _without_experts:
    """The layer runs up to its experts, which are shown their inputs and give zeros: what they would give is not wanted yet."""

    def __init__(self, layer: nn.Module, site: MoeBlock):
        self.experts: Any = site.experts_of(layer)

    def __enter__(self) -> None:
        self.forward: Callable[..., torch.Tensor] = self.experts.forward
        self.experts.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)

    def __exit__(self, *error: object) -> None:
        del self.experts.forward
