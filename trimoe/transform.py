"""The last walk: each layer is changed on the hidden states it is given, and written.

Low-rank factors are fitted to the inputs of the *unfactored* model: that was better on every model and ratio tried (LOG.md). Integers
and zeros are fitted progressively, to what the changed layers before give (and so are factors, where their product is changed in one recipe).
A resumed run reads the layers that it wrote back, so nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from trimoe import hf
from trimoe.checkpoint import DTYPES
from trimoe.decide import Run
from trimoe.gather import prune_layer, survivors
from trimoe.journal import Journal
from trimoe.linears import Inputs
from trimoe.methods import LowRank, Quantize, WeightPrune
from trimoe.methods.method import Decisions, LayerDecision
from trimoe.methods.quantize import QuantizedLayer, put_back
from trimoe.seen import FEW, Recorder, Seen
from trimoe.skeleton import Site, tensor_at
from trimoe.stream import LayerWalk
from trimoe.write import Writer


@torch.no_grad()
def transform(run: Run, decisions: Decisions, writer: Writer, journal: Journal) -> dict[str, Any]:
    """Write all groups: 0 is what lies outside the layers, then one a layer. Where nothing is computed, all of it is a copy. Returns what
    is worth knowing about it, by step."""
    factor = next((step for step in run.recipe.steps if isinstance(step, LowRank)), None)
    change = next((step for step in run.recipe.steps if isinstance(step, Quantize | WeightPrune)), None)
    left = survivors(run.skeleton, decisions)
    computed = [i for i in left if (d := decisions.get(i)) and (d.changed or (d.gone is None and d.in_ranks is not None))]
    writer.put(0)
    label = f"{change.label} and write" if change else "Factor and write" if factor else "Write"
    fitted = factor is not None or (change is not None and change.calibrated)
    walk = None
    if computed and not all(writer.done(index + 1) for index in computed):
        walk = LayerWalk(run.skeleton, run.batches if fitted else [], device=run.device)
    for index in run.reporter.track(range(len(run.skeleton.layers)), label, len(run.skeleton.layers)):
        if walk is None or index not in left or (index not in computed and not fitted):
            writer.put(index + 1)
            continue
        with walk.layer(index) as layer:
            site = prune_layer(run.skeleton, index, layer, decisions)
            if index not in computed:
                walk.advance(index, layer)
                writer.put(index + 1)
            elif change is not None:
                _change(run, walk, index, layer, site, decisions[index], writer, journal, factor, change)
            elif writer.done(index + 1):
                walk.advance(index, layer)
            else:
                assert factor is not None and site is not None
                recorder = Recorder(sum(batch.numel() for batch in run.batches))
                with recorder.attached(layer, site):
                    walk.advance(index, layer)
                new = factor.transform(site.experts_of(layer), site, decisions[index], recorder.seen())
                writer.put(index + 1, writer.layout.disk_form(index, _made(writer, site, index, new)))
                del recorder, new  # not beside the next layer
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
    run: Run, walk: LayerWalk, index: int, layer: nn.Module, site: Site | None, decision: LayerDecision, writer: Writer, journal: Journal,
    factor: LowRank | None, change: Quantize | WeightPrune,
) -> None:  # fmt: skip
    """One layer's matrices to integers or with zeros (their product of factors, where they were factored before), and the batches through
    them."""
    if writer.done(index + 1):
        dense = writer.layout.read_back(index, writer.out)
        hf.load_into(run.skeleton.model, dense, walk.device, run.skeleton.dtype)
        walk.advance(index, layer)
        return
    seen, inputs = _watched(walk, index, layer, site, decision.linears) if walk.batches else (None, None)
    experts = site.experts_of(layer) if site is not None else None
    if decision.in_ranks is not None and site is not None:
        assert factor is not None and seen is not None
        experts = factor.transform(experts, site, decision, seen)
    linears = {path: (tensor_at(layer, f"{path}.weight"), None if inputs is None else inputs.moment(path)) for path in decision.linears}
    if isinstance(change, Quantize):
        group, packed = decision.group or 0, QuantizedLayer()
        if site is not None:
            packed = change.transform(experts, site, seen, group, DTYPES[writer.layout.expert_dtype(index, run.skeleton.sites[index])])
        for path, (weight, moment) in linears.items():
            packed.linears[path] = change.linear(weight, moment, group, DTYPES[writer.layout.linear_dtype(index, path)])
            weight.copy_(packed.linears[path].dense())
        journal.put(f"changed-{index}", {"borrowed": packed.borrowed})
        writer.put(index + 1, writer.layout.packed_form(index, packed))
        if site is not None:
            put_back(experts, packed)
    else:
        about = change.transform(experts, site, seen) if site is not None else {}
        for weight, moment in linears.values():
            change.linear(weight, moment)
        journal.put(f"changed-{index}", about)
        writer.put(index + 1, writer.layout.pruned_form(index, layer))
    walk.advance(index, layer)


def _watched(walk: LayerWalk, index: int, layer: nn.Module, site: Site | None, linears: tuple[str, ...]) -> tuple[Seen | None, Inputs]:
    """What the layer's experts and linears are given, as the layers before leave it."""
    recorder, inputs = Recorder(sum(batch.numel() for batch in walk.batches)), Inputs(layer, linears)
    with ExitStack() as stack:
        stack.enter_context(inputs.attached())
        if site is not None:
            stack.enter_context(recorder.attached(layer, site))
            stack.enter_context(_without_experts(layer, site))
        for batch, hidden in enumerate(walk.hidden):
            walk.step(index, layer, hidden, batch)
    return recorder.seen() if site is not None else None, inputs


def _made(writer: Writer, site: Site, index: int, new: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{site.block}.{site.experts}.{name}": tensor_at(new, name).detach() for name in writer.layout.made(index)}


class _without_experts:
    """The layer runs up to its experts, which are shown their inputs and give zeros: what they would give is not wanted yet."""

    def __init__(self, layer: nn.Module, site: Site):
        self.experts: Any = site.experts_of(layer)

    def __enter__(self) -> None:
        self.forward: Callable[..., torch.Tensor] = self.experts.forward
        self.experts.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)

    def __exit__(self, *error: object) -> None:
        del self.experts.forward
