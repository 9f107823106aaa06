"""Block-wise KT-Reception Field, MoE-I2 arXiv 2411.01016, section 3.1: choose among each layer's k best sets by the error t layers on.

In blocks of t MoE layers all k^t combinations are run through the real decoder layers (attention, norms, residuals, shared experts)
and compared with the original model's hidden states at the block's end. Prefixes are shared: k + k^2 + ... + k^t layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trimoe.gather import prune_layer
from trimoe.methods.expert_drop import Drop, ReceptiveField
from trimoe.methods.method import Decisions
from trimoe.observe import masked
from trimoe.progress import QUIET, Reporter
from trimoe.skeleton import Skeleton
from trimoe.stream import LayerWalk


@dataclass
class _Branch:
    drops: tuple[Drop, ...]
    places: tuple[int, ...]  # which of each layer's candidates
    hidden: list[torch.Tensor]


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
) -> Chosen:
    """The best combination in each block. `candidates[i]`: layer i's best sets, best first, in the model as `decisions` leave it.

    `progressive`: a block starts from the hidden states that the pruned blocks before it leave, and is compared with the original
    model's; `layerwise`: it starts from the original's.
    """
    walk = LayerWalk(skeleton, batches, device=device)
    pruned = list(walk.hidden)
    branches = [_Branch((), (), pruned)]
    layers: list[int] = []
    chosen: dict[int, Drop] = {}
    blocks: list[dict[str, object]] = []
    last = max(candidates, default=-1)
    for index in reporter.track(range(len(walk)), "Receptive field", len(walk)):
        with walk.layer(index) as layer:
            grown = []
            site = skeleton.sites.get(index)
            if site is not None:
                site = prune_layer(layer, site, decisions)
            options = list(candidates[index][: field.k]) if index in candidates else [None]
            for branch in branches:
                for place, drop in enumerate(options):
                    if drop is None or site is None:
                        out = [walk.step(index, layer, h, b) for b, h in enumerate(branch.hidden)]
                        grown.append(_Branch(branch.drops, branch.places, out))
                        continue
                    with masked(layer, site, drop):
                        out = [walk.step(index, layer, h, b) for b, h in enumerate(branch.hidden)]
                    grown.append(_Branch((*branch.drops, drop), (*branch.places, place), out))
            branches = grown
            walk.advance(index, layer)
        if index in candidates:
            layers.append(index)
        if layers and (len(layers) == field.t or index == last):
            errors = [_distance(branch.hidden, walk.hidden) for branch in branches]
            best = min(range(len(branches)), key=errors.__getitem__)
            chosen |= dict(zip(layers, branches[best].drops, strict=True))
            blocks.append({"layers": layers, "places": list(branches[best].places), "error": errors[best], "error_of_first": errors[0]})
            start = branches[best].hidden if field.mode == "progressive" else list(walk.hidden)
            branches, layers = [_Branch((), (), start)], []
    return Chosen(chosen, blocks)


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Frobenius distance over all tokens, relative to the original."""
    off = torch.stack([(x - y).double().square().sum() for x, y in zip(a, b, strict=True)]).sum()
    return float((off / torch.stack([y.double().square().sum() for y in b]).sum().clamp_min(1e-30)).sqrt())
