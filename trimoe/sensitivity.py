"""How much the model's output minds an error in each MoE layer: end-to-end KL per unit of squared relative layer error.

One streamed pass serves all layers: at each MoE layer a branch leaves the unperturbed stream and is carried along to the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimoe.distributed import ALONE, Team
from trimoe.methods.method import Decisions
from trimoe.progress import QUIET, Reporter
from trimoe.site import Site
from trimoe.skeleton import Skeleton
from trimoe.variants import Change, divergence

SHRINK = 0.3  # share of the routed output taken away where no experts are to be masked
ORIGINAL = -1


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


def sensitivity(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    perturb: Mapping[int, Any],
    *,
    decisions: Decisions | None = None,
    device: str = "cpu",
    reporter: Reporter = QUIET,
    team: Team = ALONE,
) -> Sensitivity:
    """Perturb the MoE layers of `perturb` one at a time in the model that `decisions` leave, and measure what comes out at the end.
    `perturb[i]`: (layer, site) -> context manager that holds while layer i runs wrong."""
    probes = {index: _Probe(change) for index, change in perturb.items()}
    right: dict[int, Change] = {index: probe.right for index, probe in probes.items()}
    wrong: dict[int, Change] = {index: probe.wrong for index, probe in probes.items()}
    versions = {ORIGINAL: right}
    for index in probes:  # watched up to the layer that goes wrong, on its own from there
        versions[index] = {i: change for i, change in right.items() if i < index} | {index: wrong[index]}
    kl = divergence(
        skeleton, batches, versions, ORIGINAL, decisions=decisions, device=device, label="Sensitivity", reporter=reporter, team=team
    )
    return Sensitivity(kl, {index: probe.error(team) for index, probe in probes.items()})


class _Probe:
    """Two versions of one layer, right and wrong, and how far apart its experts' outputs are in them."""

    def __init__(self, change: Any):
        self.change = change
        self.squares: list[torch.Tensor] = []  # of each batch: [||wrong - right||^2, ||right||^2]
        self.outputs: dict[str, list[torch.Tensor]] = {"right": [], "wrong": []}
        # bound methods are made anew at every access; versions share streams by identity
        self.right, self.wrong = self._watched("right"), self._watched("wrong")

    def _watched(self, which: str) -> Change:
        @contextmanager
        def run(layer: nn.Module, site: Site | None) -> Iterator[None]:
            assert site is not None
            seen = self.outputs[which]
            if which == "wrong":
                with self.change(layer, site), _output(layer, site, seen):
                    yield
            else:
                with _output(layer, site, seen):
                    yield
            self._compare()

        return run

    def _compare(self) -> None:
        """Once both versions ran, how far they are apart is kept and the outputs are let go."""
        wrong, right = self.outputs["wrong"], self.outputs["right"]
        if len(wrong) == len(right):
            pairs = zip(wrong, right, strict=True)
            self.squares = [
                torch.stack([(a.float() - b.float()).double().square().sum(), b.double().square().sum()]).cpu() for a, b in pairs
            ]
            wrong.clear()
            right.clear()

    def error(self, team: Team) -> float:
        """||wrong - right|| / ||right|| over all batches."""
        squares = [square for own in team.everyone(self.squares) for square in own]
        off, whole = (torch.stack([square[place] for square in squares]).sum() if squares else torch.zeros(()) for place in (0, 1))
        return float((off / whole.clamp_min(1e-30)).sqrt())


@contextmanager
def _output(layer: nn.Module, site: Site, seen: list[torch.Tensor]) -> Iterator[None]:
    """Adds what the layer's experts give to `seen`."""
    handle = site.experts_of(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield
    finally:
        handle.remove()
