"""What an MoE block's experts were given over all calibration tokens, for methods that fit weights to their inputs.

Letters: T tokens, k chosen experts per token, S routed tokens of one expert, P tokens of the pool, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trimoe.model.moe_block import MoeBlock
from trimoe.walk.finite import checked
from trimoe.walk.hidden_states import room

POOL_TOKENS = 2048  # tokens of a layer that stand for all
POOL_WEIGHT = 256  # tokens that the pool counts as beside an expert's own
FEW = 128  # tokens: an expert that saw fewer is fitted to its layer's inputs more than to its own
DAMP = 1e-4  # of the mean diagonal, added to second moments


@dataclass
class LayerInputs:
    """What one MoE block's experts were given: inputs x_TH and routing index_TK, weight_TK of all calibration tokens."""

    x_TH: torch.Tensor
    index_TK: torch.Tensor
    weight_TK: torch.Tensor

    def rows(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_TH, index_TK) of some tokens, on the experts' device: inputs beyond the budget lie in a file."""
        device = self.index_TK.device
        return self.x_TH[tokens.to(self.x_TH.device)].to(device), self.index_TK[tokens.to(device)]

    @cached_property
    def pool(self) -> LayerSample:
        """Every so-many-th token of the layer, whichever experts it chose."""
        return LayerSample(self.x_TH[:: max(1, len(self.x_TH) // POOL_TOKENS)].to(self.index_TK.device))

    def of(self, expert: int) -> ExpertInputs:
        """What one expert was given, and the layer's pool."""
        tokens, places = (self.index_TK == expert).nonzero(as_tuple=True)
        return ExpertInputs(self.rows(tokens)[0], self.weight_TK[tokens, places].float(), self.pool)


@dataclass
class LayerSample:
    """Inputs x_PN that stand for all of a layer's. Their moment is the same beside every expert, so it is taken once."""

    x_PN: torch.Tensor

    @cached_property
    def moment(self) -> torch.Tensor:
        return _mean_product(self.x_PN, self.x_PN)


def _mean_product(a_PM: torch.Tensor, b_PN: torch.Tensor) -> torch.Tensor:
    """The mean of a b^T, [M, N] float64."""
    return (a_PM.float().T @ b_PN.float()).double() / len(a_PM)


@dataclass
class ExpertInputs:
    """Inputs x_SH of an expert's routed tokens with their weights gate_S, and the pool of the whole layer's."""

    x_SH: torch.Tensor
    gate_S: torch.Tensor
    pool: LayerSample

    @property
    def pool_PH(self) -> torch.Tensor:
        return self.pool.x_PN

    @property
    def moment(self) -> torch.Tensor:
        """The second moment of the inputs; see `blended`."""
        return self._mixed(self.x_SH, self.x_SH, lambda: self.pool.moment)

    def blended(self, a_SM: torch.Tensor, b_SN: torch.Tensor, pool_a: torch.Tensor, pool_b: torch.Tensor) -> torch.Tensor:
        """(n C + n0 C_pool) / (n + n0), float64: C = sum g^2 a b^T / sum g^2 over the expert's n tokens (weighted as they count in the
        layer's output), C_pool the plain mean of a b^T over the pool. An expert that saw few tokens leans on the layer. Raises Inside where
        they are not finite."""
        return self._mixed(a_SM, b_SN, lambda: _mean_product(pool_a, pool_b))

    def _mixed(self, a_SM: torch.Tensor, b_SN: torch.Tensor, pooled: Callable[[], torch.Tensor]) -> torch.Tensor:
        return checked(self._mean(a_SM, b_SN, pooled), "the moments of what an expert is given", a_SM.dtype)

    def _mean(self, a_SM: torch.Tensor, b_SN: torch.Tensor, pooled: Callable[[], torch.Tensor]) -> torch.Tensor:
        count = len(self.gate_S)
        if not count:
            return pooled()
        square_S = self.gate_S.square()
        own = ((a_SM.float() * square_S.unsqueeze(1)).T @ b_SN.float()).double() / square_S.double().sum().clamp_min(1e-12)
        return (count * own + POOL_WEIGHT * pooled()) / (count + POOL_WEIGHT)


def damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    """`moment` with `share` of its mean diagonal added to the diagonal."""
    diagonal = moment.diagonal()
    return moment + torch.diag_embed((share * diagonal.mean() + 1e-12).expand_as(diagonal))


class InputRecorder:
    """Keeps, in one piece of memory, what a layer's experts are called with while `attached`; `tokens` is how many there will be."""

    def __init__(self, tokens: int):
        self.tokens, self.count = tokens, 0
        self.held: list[torch.Tensor] = []

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())[:3]
        if not self.held:
            self.held = [room((self.tokens, part.shape[-1]), part.dtype, part.device) for part in given]
        end = self.count + len(given[0])
        for whole, part in zip(self.held, given, strict=True):
            whole[self.count : end] = part
        self.count = end

    @contextmanager
    def attached(self, layer: nn.Module, site: MoeBlock) -> Iterator[None]:
        handle = site.experts_of(layer).register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def seen(self) -> LayerInputs:
        """All that was recorded; raises RuntimeError if it is not all of the tokens."""
        if self.count != self.tokens:
            raise RuntimeError(f"{self.count} tokens came by the experts, {self.tokens} were expected")
        return LayerInputs(*self.held)
