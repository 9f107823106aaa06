"""How much the model's output minds an error in each MoE layer: end-to-end KL per unit of squared relative layer error.

One streamed pass serves all layers: at each MoE layer a branch leaves the unperturbed stream and is carried along to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimoe.gather import prune_layer
from trimoe.methods.method import Decisions
from trimoe.progress import QUIET, Reporter
from trimoe.skeleton import Site, Skeleton
from trimoe.stream import LayerWalk

Perturb = Callable[[nn.Module, Site], AbstractContextManager[None]]
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


def affordable(batches: Sequence[torch.Tensor], branches: int, hidden: int, memory: float) -> list[torch.Tensor]:
    """As many samples, evenly spread over the calibration set, as `branches` copies of their hidden states fit in `memory` GiB."""
    samples = torch.cat(list(batches))
    fits = int(memory * 2**30 / (4 * hidden * samples.shape[1] * (branches + 2)))
    count = max(1, min(len(samples), fits, 24))
    rows = torch.linspace(0, len(samples) - 1, count).round().long()
    return list(samples[rows].split(max(1, 4096 // samples.shape[1])))


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
            if site is not None and index in perturb:
                with perturb[index](layer, site), _outputs(layer, site) as wrong:
                    branches[index] = [walk.step(index, layer, hidden, batch) for batch, hidden in enumerate(walk.hidden)]
                with _outputs(layer, site) as right:
                    walk.advance(index, layer)
                error[index] = float((_energy(wrong, right) / _energy(right, None).clamp_min(1e-30)).sqrt())
            else:
                walk.advance(index, layer)
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
def _outputs(layer: nn.Module, site: Site) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.append(output)

    handle = site.experts_of(layer).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _energy(a: list[torch.Tensor], b: list[torch.Tensor] | None) -> torch.Tensor:
    pairs = zip(a, b, strict=True) if b is not None else ((x, torch.zeros((), dtype=x.dtype, device=x.device)) for x in a)
    return torch.stack([(x - y).double().square().sum() for x, y in pairs]).sum()
