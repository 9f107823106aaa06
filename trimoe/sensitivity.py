"""How much the model's output minds an error in each MoE layer: end-to-end KL per unit of squared relative layer error.

One streamed pass serves all layers: at each MoE layer a branch leaves the unperturbed stream and is carried along to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from trimoe.calibration import in_batches
from trimoe.gather import prune_layer
from trimoe.methods.method import Decisions
from trimoe.progress import QUIET, Reporter
from trimoe.skeleton import Site, Skeleton
from trimoe.stream import LayerWalk

Perturb = Callable[[nn.Module, Site], AbstractContextManager[None]]
SAMPLES = 24  # what layers are measured on, where memory allows
FLOOR = 96 << 20  # bytes
SHRINK = 0.3  # share of the routed output taken away where no experts are to be masked


@dataclass(frozen=True)
class Sensitivity:
    """`kl[i]`: mean KL(original || perturbed) in nats per token; `loss[i]`: the relative layer error that caused it."""

    kl: dict[int, float]
    loss: dict[int, float]

    def weights(self) -> dict[int, float]:
        """s_i = KL_i / L_i^2; a layer that could not be perturbed gets the mean of the others."""
        known = {i: max(self.kl[i], 1e-9) / self.loss[i] ** 2 for i in self.kl if self.loss[i] > 1e-6}
        mean = sum(known.values()) / max(1, len(known)) or 1.0
        return {i: known.get(i, mean) for i in self.kl}


@contextmanager
def shrunk(layer: nn.Module, site: Site) -> Iterator[None]:
    """The routed experts' output, scaled down by SHRINK."""
    handle = site.experts_of(layer).register_forward_hook(lambda module, args, output: output * (1 - SHRINK))
    try:
        yield
    finally:
        handle.remove()


def affordable(skeleton: Skeleton, batches: Sequence[torch.Tensor], branches: int, device: str = "cpu") -> list[torch.Tensor]:
    """Samples, evenly spread over the calibration set: at most SAMPLES, and so many that `branches` copies of their hidden states take
    no more memory than half a decoder layer or FLOOR bytes, whichever is more; at least one."""
    samples = torch.cat(list(batches))
    room = max(FLOOR, skeleton.largest_layer // 2)
    hidden = next(iter(skeleton.sites.values())).hidden
    fits = room // (skeleton.dtype.itemsize * hidden * samples.shape[1] * (branches + 2))
    count = max(1, min(len(samples), fits, SAMPLES))
    rows = torch.linspace(0, len(samples) - 1, count).round().long()
    return in_batches(samples[rows], device)


@torch.no_grad()
def sensitivity(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    perturb: Mapping[int, Perturb],
    *,
    decisions: Decisions | None = None,
    device: str = "cpu",
    reporter: Reporter = QUIET,
) -> Sensitivity:
    """Perturb the MoE layers of `perturb` one at a time in the model that `decisions` leave, and measure what comes out at the end."""
    walk = LayerWalk(skeleton, batches, device=device)
    branches: dict[int, list[torch.Tensor]] = {}
    error: dict[int, float] = {}
    for index in reporter.track(range(len(walk)), "Sensitivity", len(walk)):
        with walk.layer(index) as layer:
            site = skeleton.sites.get(index)
            if site is not None:
                site = prune_layer(layer, site, decisions)
            for branch in branches.values():
                for batch, hidden in enumerate(branch):
                    branch[batch] = walk.step(index, layer, hidden, batch)
            if site is None or index not in perturb:
                walk.advance(index, layer)
                continue
            branches[index], off, whole = [], 0.0, 0.0
            for batch, hidden in enumerate(walk.hidden):
                with perturb[index](layer, site), _output(layer, site) as wrong:
                    branches[index].append(walk.step(index, layer, hidden, batch))
                with _output(layer, site) as right:
                    walk.hidden[batch] = walk.step(index, layer, hidden, batch)
                off += float((wrong[0] - right[0]).double().square().sum())
                whole += float(right[0].double().square().sum())
            error[index] = (off / max(whole, 1e-30)) ** 0.5
    total = dict.fromkeys(branches, 0.0)
    tokens = 0
    with walk.head() as head:
        for batch, hidden in enumerate(walk.hidden):
            log_p = head(hidden, batch).float().log_softmax(-1)
            tokens += log_p.shape[0] * log_p.shape[1]
            for index, branch in branches.items():
                log_q = head(branch[batch], batch).float().log_softmax(-1)
                total[index] += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return Sensitivity({i: value / tokens for i, value in total.items()}, error)


@contextmanager
def _output(layer: nn.Module, site: Site) -> Iterator[list[torch.Tensor]]:
    """A list that what the layer's experts give is put into."""
    seen: list[torch.Tensor] = []
    handle = site.experts_of(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
