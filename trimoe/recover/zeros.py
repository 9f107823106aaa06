"""Weights that stay zero while the others are trained: what pruning took out must not grow back.

Zeros alone do not say that anything was pruned: of weights rounded to 4-bit floats or integers about a tenth is exactly zero, of ternary ones a
third and more. So trimoe.json is asked first, which names pruning steps; where it names none, the pattern of the zeros has to show it.

Letters: E experts (or other matrices in a stack), O rows and I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

SPARSE = 0.001  # share of zeros below which no matrix counts as pruned
MANY = 0.3  # share from which on zeros without an order count, unless the other weights lie on a coarse grid
PATTERNS = ((1, 4), (2, 4), (4, 8))  # n of m consecutive weights stay
ROWS = 16  # as many of them do not have equally many zeros by chance
WINDOW, GRID = 64, 0.6  # of so many weights in a row that are not zero, at most this share has magnitudes of its own on a grid of 4 bits
SAMPLED, FEWEST = 32, 16  # rows that are looked at for that, and weights in one that say anything


def zero_masks(named: Mapping[str, torch.Tensor], known: Callable[[str], bool] = lambda name: False) -> dict[str, torch.Tensor]:
    """Name -> mask (True: may be non-zero) of every matrix or stack of matrices with pruned zeros. `known`: whether a pruning step is known
    to have gone over it, so that all its zeros are taken for pruned."""
    masks = {}
    for name, tensor in named.items():
        if tensor.dim() >= 2 and tensor.numel():
            mask = tensor.detach() != 0
            if int((~mask).sum()) >= SPARSE * mask.numel() and (known(name) or looks_pruned(tensor.detach())):
                masks[name] = mask
    return masks


def looks_pruned(tensor: torch.Tensor) -> bool:
    """Whether the zeros of a matrix or stack of matrices are pruned by their pattern: equally many in every row (or column: stacks may be
    stored transposed), n of m, all of it, or many where the other weights lie on no coarse grid."""
    zero_EOI = (tensor == 0).flatten(0, -3) if tensor.dim() > 2 else (tensor == 0).unsqueeze(0)
    count = int(zero_EOI.sum())
    if count < SPARSE * tensor.numel():
        return False
    if count == tensor.numel() or _regular(zero_EOI) or _regular(zero_EOI.mT):
        return True
    return count >= MANY * tensor.numel() and not _grid(tensor) and not _grid(tensor.mT)


def _regular(zero_EOI: torch.Tensor) -> bool:
    """Whether all rows have equally many zeros, or every m consecutive weights at least m - n."""
    count_EO = zero_EOI.sum(-1)
    if count_EO.numel() >= ROWS and int(count_EO.min()) == int(count_EO.max()) > 0:
        return True
    width = zero_EOI.shape[-1]
    return any(width % of == 0 and bool((zero_EOI.unflatten(-1, (-1, of)).sum(-1) >= of - keep).all()) for keep, of in PATTERNS)


def _grid(tensor: torch.Tensor) -> bool:
    """Whether weights that follow each other in a row share their magnitudes, as those of a few bits do."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    shares = []
    for place in torch.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).round().long().tolist():
        values = rows[place][rows[place] != 0][:WINDOW].abs()
        if len(values) >= FEWEST:
            shares.append(len(values.unique()) / len(values))
    return bool(shares) and sorted(shares)[len(shares) // 2] <= GRID


class HeldZeros:
    """Holds the zeros of parameters, given {parameter: mask}."""

    def __init__(self, masks: Mapping[torch.Tensor, torch.Tensor]):
        self.masks = dict(masks)

    def register(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Mask the gradients as they come, so that an optimiser's moments stay zero too."""
        return [parameter.register_hook(lambda grad, mask=mask: grad * mask) for parameter, mask in self.masks.items()]  # type: ignore[misc]

    @torch.no_grad()
    def hold(self) -> None:
        """After an optimiser's step (weight decay and rounding can move what has no gradient)."""
        for parameter, mask in self.masks.items():
            parameter.data.mul_(mask)
