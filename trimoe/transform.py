"""The last walk: each layer is changed on the hidden states of the model that earlier steps left, and written.

The factored layers' own outputs are not fed forward: factoring on the inputs of the unfactored model was better on every model and
ratio tried (LOG.md), takes one forward run a layer, and makes a resumed run independent of what it wrote before.
"""

from __future__ import annotations

import torch

from trimoe.decide import Run
from trimoe.gather import prune_layer
from trimoe.methods import LowRank
from trimoe.methods.method import Decisions
from trimoe.seen import Recorder
from trimoe.skeleton import tensor_at
from trimoe.stream import LayerWalk
from trimoe.write import Writer


@torch.no_grad()
def transform(run: Run, decisions: Decisions, writer: Writer) -> None:
    """Write all groups: 0 is what lies outside the layers, then one a layer. Where nothing is computed, all of it is a copy."""
    layers = len(run.skeleton.layers)
    writer.put(0)
    step = next((step for step in run.recipe.steps if isinstance(step, LowRank)), None)
    computed = [index + 1 for index, decision in decisions.items() if decision.in_ranks is not None]
    if step is None or all(map(writer.done, computed)):
        for index in run.reporter.track(range(layers), "Write", layers):
            writer.put(index + 1)
        return
    walk = LayerWalk(run.skeleton, run.batches, device=run.device)
    for index in run.reporter.track(range(layers), "Factor and write", layers):
        with walk.layer(index) as layer:
            site = run.skeleton.sites.get(index)
            if site is None or decisions[index].in_ranks is None or writer.done(index + 1):
                if site is not None:
                    prune_layer(layer, site, decisions)
                walk.advance(index, layer)
                writer.put(index + 1)
                continue
            site = prune_layer(layer, site, decisions)
            recorder = Recorder(sum(batch.numel() for batch in run.batches))
            with recorder.attached(layer, site):
                walk.advance(index, layer)
            new = step.transform(site.experts_of(layer), site, decisions[index], recorder.seen())
            made = {name: tensor_at(new, name).detach() for name in writer.layout.made(index)}
            writer.put(index + 1, writer.layout.disk_form(index, made))
            del recorder, new, made  # not beside the next layer
