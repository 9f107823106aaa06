"""How much the model's output minds an error in each MoE layer: end-to-end KL per unit of squared relative layer error.

One streamed pass serves all layers: at each MoE layer a branch leaves the unperturbed stream and is carried along to the end.

In 16 bits any change of a layer, however small, is followed by other roundings and other experts in all later ones, and these alone make a
KL: the floor. It is measured, by changes of the size of a rounding, and taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trimoe.model.decision import Decisions
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET, Reporter
from trimoe.team import ALONE, Team
from trimoe.walk.hidden_states import HiddenStates
from trimoe.walk.versions import Change, budget_of, divergence

SHRINK = 0.3  # share of the routed output taken away where no experts are to be masked
LEAST = 0.02  # relative error of a layer that a probe makes at least: below it roundings are most of what is measured
FLOORS = 8  # layers, evenly spread, from which the floor is measured; between them it is taken to change evenly
SIGNAL = 0.25  # of a KL that is left at least, whatever the floor
ORIGINAL = "original"


@dataclass(frozen=True)
class Sensitivity:
    """`kl[i]`: mean KL(original || perturbed) in nats per token; `loss[i]`: the relative layer error that caused it; `floor[i]`: how much of the
    KL rounding alone makes."""

    kl: dict[int, float]
    loss: dict[int, float]
    floor: dict[int, float]

    def signal(self, index: int) -> float:
        """The KL without its floor."""
        return max(self.kl[index] - self.floor[index], SIGNAL * self.kl[index], 1e-9)

    def weights(self) -> dict[int, float]:
        """s_i = KL_i / L_i^2; a layer that could not be perturbed gets the mean of the others."""
        known = {i: self.signal(i) / self.loss[i] ** 2 for i in self.kl if self.loss[i] > 1e-6}
        mean = sum(known.values()) / max(1, len(known)) or 1.0
        return {i: known.get(i, mean) for i in self.kl}


@contextmanager
def shrunk(layer: nn.Module, site: MoeBlock) -> Iterator[None]:
    """The routed experts' output, scaled down by SHRINK."""
    handle = site.experts_of(layer).register_forward_hook(lambda module, args, output: output * (1 - SHRINK))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def nudged(layer: nn.Module, site: MoeBlock) -> Iterator[None]:
    """The routed experts' output, every fourth channel rounded to the next number up or down: no change but another rounding."""

    def nudge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        little = torch.zeros(output.shape[-1], device=output.device)
        little[::8], little[4::8] = torch.finfo(output.dtype).eps / 2, -torch.finfo(output.dtype).eps / 2
        return (output.float() * (1 + little)).to(output.dtype)

    handle = site.experts_of(layer).register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


def probe_size(losses: Mapping[int, float], wanted: int) -> int:
    """How many experts a probe drops: those that go where all layers lose alike (`wanted`), and more until the layer's error is LEAST; 0, which
    is to say that `shrunk` stands in, where no number of them makes such an error. `losses`: of every number that can go."""
    return next((n for n in sorted(losses) if n and n >= min(wanted, max(losses)) and losses[n] >= LEAST), 0)


def floor_layers(layers: Sequence[int], dtype: torch.dtype) -> list[int]:
    """The layers from which the floor is measured: none in float32, where it is nothing beside any probe."""
    if dtype == torch.float32 or not layers:
        return []
    return sorted({layers[round(at)] for at in torch.linspace(0, len(layers) - 1, FLOORS, dtype=torch.float64).tolist()})


def streams(layers: Sequence[int], dtype: torch.dtype) -> int:
    """How many versions of the model are walked beside the original."""
    return len(layers) + len(floor_layers(layers, dtype))


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
    budget = budget_of(skeleton, streams(list(perturb), skeleton.dtype) + 1, torch.device(device))
    probes = {index: _Probe(change, budget) for index, change in perturb.items()}
    # bound methods are made anew at every access; versions share streams by identity
    right: dict[int, Change] = {index: probe.right for index, probe in probes.items()}
    wrong: dict[int, Change] = {index: probe.wrong for index, probe in probes.items()}
    versions: dict[Hashable, Mapping[int, Change]] = {ORIGINAL: right}
    for index in probes:  # watched up to the layer that goes wrong, on its own from there
        versions[index] = {i: change for i, change in right.items() if i < index} | {index: wrong[index]}
    for index in floor_layers(list(probes), skeleton.dtype):
        versions["floor", index] = {i: change for i, change in right.items() if i < index} | {index: _nudged}
    kl = divergence(
        skeleton, batches, versions, ORIGINAL, decisions=decisions, device=device, label="Sensitivity", reporter=reporter, team=team
    )
    floors = {key[1]: value for key, value in kl.items() if isinstance(key, tuple)}
    return Sensitivity(
        {index: kl[index] for index in probes}, {index: probe.error(team) for index, probe in probes.items()},
        dict(zip(probes, np.interp(list(probes), list(floors), list(floors.values())).tolist() if floors else [0.0] * len(probes), strict=True)),
    )  # fmt: skip


def _nudged(layer: nn.Module, site: MoeBlock | None) -> AbstractContextManager[None]:
    assert site is not None
    return nudged(layer, site)


class _Probe:
    """Two versions of one layer, right and wrong, and how far apart its experts' outputs are in them. The right one runs first."""

    def __init__(self, change: Any, budget: int):
        self.change, self.budget = change, budget
        self.squares: list[torch.Tensor] = []  # of each batch: [||wrong - right||^2, ||right||^2]
        self.outputs = HiddenStates(budget)

    @contextmanager
    def right(self, layer: nn.Module, site: MoeBlock | None) -> Iterator[None]:
        assert site is not None
        with _output(layer, site, self.outputs.append):
            yield

    @contextmanager
    def wrong(self, layer: nn.Module, site: MoeBlock | None) -> Iterator[None]:
        assert site is not None
        with self.change(layer, site), _output(layer, site, self._compare):
            yield
        self.outputs = HiddenStates(self.budget)

    def _compare(self, wrong: torch.Tensor) -> None:
        right = self.outputs[len(self.squares)]
        self.squares.append(torch.stack([(wrong.float() - right.float()).double().square().sum(), right.double().square().sum()]))

    def error(self, team: Team) -> float:
        """||wrong - right|| / ||right|| over all batches."""
        squares = [square for own in team.everyone([square.cpu() for square in self.squares]) for square in own]
        off, whole = (torch.stack([square[place] for square in squares]).sum() if squares else torch.zeros(()) for place in (0, 1))
        return float((off / whole.clamp_min(1e-30)).sqrt())


@contextmanager
def _output(layer: nn.Module, site: MoeBlock, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Shows what the layer's experts give."""
    handle = site.experts_of(layer).register_forward_hook(lambda module, args, output: see(output))
    try:
        yield
    finally:
        handle.remove()
