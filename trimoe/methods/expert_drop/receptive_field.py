"""Block-wise KT-Reception Field, MoE-I2 arXiv 2411.01016, section 3.1: choose among each layer's k best sets by the error t layers on.

In blocks of t MoE layers all k^t combinations are run through the real decoder layers (attention, norms, residuals, shared experts)
and compared with the original model's hidden states at the block's end. Prefixes are shared: k + k^2 + ... + k^t layer runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trimoe.methods.expert_drop.options import Drop, ReceptiveField
from trimoe.model.decision import Decisions, kept_layers
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET, Reporter
from trimoe.team import ALONE, Team
from trimoe.walk.decided import masked, prune_layer
from trimoe.walk.versions import budget_of, carried
from trimoe.walk.walk import LayerWalk


def streams(field: ReceptiveField) -> int:
    """How many branches are carried along at most, beside the one that ends and the best so far."""
    return int(field.k ** (field.t - 1)) + 2


@dataclass
class _Branch:
    drops: tuple[Drop, ...]
    places: tuple[int, ...]  # which of each layer's candidates
    hidden: MutableSequence[torch.Tensor]


@dataclass(frozen=True)
class Chosen:
    """`drops`: the set for each layer; `blocks`: layers, the places chosen (0 = the layer's own best), its error and that of all-best."""

    drops: dict[int, Drop]
    blocks: list[dict[str, object]]


@torch.no_grad()
def choose(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    candidates: Mapping[int, Sequence[Drop]],
    field: ReceptiveField,
    *,
    decisions: Decisions | None = None,
    device: str = "cpu",
    reporter: Reporter = QUIET,
    team: Team = ALONE,
) -> Chosen:
    """The best combination in each block. `candidates[i]`: layer i's best sets, best first, in the model as `decisions` leave it. Of a team
    each process carries its stretch of the batches.

    `progressive`: a block starts from the hidden states that the pruned blocks before it leave, and is compared with the original
    model's; `layerwise`: it starts from the original's.
    """
    walk = LayerWalk(skeleton, batches[team.span(len(batches))], device=device)
    budget = budget_of(skeleton, streams(field), walk.device)
    branches = [_Branch((), (), carried(walk.hidden, budget))]
    chosen: dict[int, Drop] = {}
    blocks: list[dict[str, object]] = []
    layers: list[int] = []
    last = max(candidates, default=-1)
    left = kept_layers(skeleton, decisions)
    for index in reporter.track(left, "Receptive field", len(left)):
        with walk.layer(index) as layer:
            site = prune_layer(skeleton, index, layer, decisions)
            walk.advance(index, layer)
            if site is None or index not in candidates:
                for branch in branches:
                    for batch, hidden in enumerate(branch.hidden):
                        branch.hidden[batch] = walk.step(index, layer, hidden, batch)
                continue
            layers.append(index)
            grown = _grown(walk, index, layer, site, branches, candidates[index][: field.k], budget)
            if len(layers) < field.t and index != last:
                branches = list(grown)
                continue
            errors: list[float] = []
            best = branches[0]
            for branch in grown:  # of all that end here, only the best so far is kept
                error = _distance(branch.hidden, walk.hidden, team)
                best = branch if error < min(errors, default=math.inf) else best
                errors.append(error)
        chosen |= dict(zip(layers, best.drops, strict=True))
        blocks.append({"layers": layers, "places": list(best.places), "error": min(errors), "error_of_first": errors[0]})
        start = best.hidden if field.mode == "progressive" else carried(walk.hidden, budget)
        branches, layers = [_Branch((), (), start)], []
    return Chosen(chosen, blocks)


def _grown(
    walk: LayerWalk, index: int, layer: nn.Module, site: MoeBlock, branches: Sequence[_Branch], options: Sequence[Drop], budget: int
) -> Iterator[_Branch]:
    """Every branch carried through the layer under each of its options, one after the other."""
    for branch in branches:
        for place, drop in enumerate(options):
            with masked(layer, site, drop):
                out = carried((walk.step(index, layer, hidden, batch) for batch, hidden in enumerate(branch.hidden)), budget)
            yield _Branch((*branch.drops, drop), (*branch.places, place), out)


def _distance(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], team: Team) -> float:
    """Frobenius distance over all processes' tokens, relative to the original."""
    pairs = [torch.stack([_square(x.float() - y.float()), _square(y)]).cpu() for x, y in zip(a, b, strict=True)]
    squares = [pair for own in team.everyone(pairs) for pair in own]
    off, whole = (torch.stack([square[place] for square in squares]).sum() for place in (0, 1))
    return float((off / whole.clamp_min(1e-30)).sqrt())


def _square(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).double().square().sum()
