"""The last walk: each layer is changed on the hidden states it is given, and written.

Low-rank factors are fitted to the inputs of the *unfactored* model: that was better on every model and ratio tried (LOG.md). Integers
are fitted progressively, to what the quantised layers before give (and so are factors, where their product is quantised in one recipe).
A resumed run reads the layers that it wrote back, so nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trimoe import hf
from trimoe.checkpoint import DTYPES
from trimoe.decide import Run
from trimoe.gather import prune_layer, survivors
from trimoe.journal import Journal
from trimoe.methods import LowRank, Quantize
from trimoe.methods.method import Decisions
from trimoe.methods.quantize import FEW, put_back
from trimoe.seen import Recorder
from trimoe.skeleton import Site, tensor_at
from trimoe.stream import LayerWalk
from trimoe.write import Writer


@torch.no_grad()
def transform(run: Run, decisions: Decisions, writer: Writer, journal: Journal) -> dict[str, Any]:
    """Write all groups: 0 is what lies outside the layers, then one a layer. Where nothing is computed, all of it is a copy. Returns what
    is worth knowing about it, by step."""
    factor = next((step for step in run.recipe.steps if isinstance(step, LowRank)), None)
    quantize = next((step for step in run.recipe.steps if isinstance(step, Quantize)), None)
    left = survivors(run.skeleton, decisions)
    computed = [i for i in left if (d := decisions.get(i)) and d.gone is None and (d.in_ranks is not None or d.bits is not None)]
    writer.put(0)
    label = "Quantise and write" if quantize else "Factor and write" if factor else "Write"
    fitted = factor is not None or (quantize is not None and quantize.method != "round")
    walk = None
    if computed and not all(writer.done(index + 1) for index in computed):
        walk = LayerWalk(run.skeleton, run.batches if fitted else [], device=run.device)
    for index in run.reporter.track(range(len(run.skeleton.layers)), label, len(run.skeleton.layers)):
        if walk is None or index not in left or (index not in computed and not fitted):
            writer.put(index + 1)
            continue
        with walk.layer(index) as layer:
            site = prune_layer(run.skeleton, index, layer, decisions)
            if site is None or index not in computed:
                walk.advance(index, layer)
                writer.put(index + 1)
            elif quantize is not None:
                _quantise(run, walk, index, layer, site, decisions, writer, journal, factor, quantize)
            elif writer.done(index + 1):
                walk.advance(index, layer)
            else:
                assert factor is not None
                recorder = Recorder(sum(batch.numel() for batch in run.batches))
                with recorder.attached(layer, site):
                    walk.advance(index, layer)
                new = factor.transform(site.experts_of(layer), site, decisions[index], recorder.seen())
                writer.put(index + 1, writer.layout.disk_form(index, _made(writer, index, new)))
                del recorder, new  # not beside the next layer
    if quantize is None:
        return {}
    borrowed = {str(i): (journal.get(f"quantised-{i}") or {}).get("borrowed", 0) for i in computed}
    if sum(borrowed.values()):
        run.reporter.say(f"{sum(borrowed.values())} experts saw fewer than {FEW} tokens and were fitted to their layer's inputs instead.")
    return {"borrowed_experts": borrowed, "quantized_share": writer.layout.quantized_share}


def _quantise(
    run: Run, walk: LayerWalk, index: int, layer: nn.Module, site: Site, decisions: Decisions, writer: Writer, journal: Journal,
    factor: LowRank | None, quantize: Quantize,
) -> None:  # fmt: skip
    """One layer's experts to integers (their product of factors, where they were factored before), and the batches through them."""
    experts, decision = site.experts_of(layer), decisions[index]
    if writer.done(index + 1):
        dense = writer.layout.read_back(index, writer.out)
        hf.load_into(run.skeleton.model, dense, walk.device, run.skeleton.dtype)
        walk.advance(index, layer)
        return
    seen = None
    if walk.batches:
        recorder = Recorder(sum(batch.numel() for batch in run.batches))
        with recorder.attached(layer, site), _without_experts(layer, site):
            for batch, hidden in enumerate(walk.hidden):
                walk.step(index, layer, hidden, batch)
        seen = recorder.seen()
    if decision.in_ranks is not None:
        assert factor is not None and seen is not None
        experts = factor.transform(experts, site, decision, seen)
    dtype = DTYPES[writer.layout.expert_dtype(index, run.skeleton.sites[index])]
    packed = quantize.transform(experts, site, seen, decision.group or 0, dtype)
    journal.put(f"quantised-{index}", {"borrowed": packed.borrowed})
    writer.put(index + 1, writer.layout.packed_form(index, packed))
    put_back(experts, packed)
    walk.advance(index, layer)


def _made(writer: Writer, index: int, new: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor_at(new, name).detach() for name in writer.layout.made(index)}


class _without_experts:
    """The layer runs up to its experts, which are shown their inputs and give zeros: what they would give is not wanted yet."""

    def __init__(self, layer: nn.Module, site: Site):
        self.experts: Any = site.experts_of(layer)

    def __enter__(self) -> None:
        self.forward: Callable[..., torch.Tensor] = self.experts.forward
        self.experts.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)

    def __exit__(self, *error: object) -> None:
        del self.experts.forward
