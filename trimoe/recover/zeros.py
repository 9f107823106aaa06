"""Weights that stay zero while the others are trained: what a pruning step took out must not grow back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

SPARSE = 0.001  # share of exact zeros from which on a matrix counts as pruned; others have next to none


def zero_masks(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> mask (True: may be non-zero) of every matrix or stack of matrices that has zeros to be kept."""
    matrices = {name: tensor.detach() != 0 for name, tensor in named.items() if tensor.dim() >= 2 and tensor.numel()}
    return {name: mask for name, mask in matrices.items() if int((~mask).sum()) >= SPARSE * mask.numel()}


class Held:
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
