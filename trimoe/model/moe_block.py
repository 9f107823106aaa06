"""One MoE block on paper: where its router and experts are, and how to take experts out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimoe.model.router import RoutingRule


@dataclass(frozen=True, kw_only=True)
class MoeBlock:
    """One MoE block. Paths in `expert_axes` are relative to the block; `H` hidden size, `I` expert width, `O` first projection's width."""

    layer: int
    block: str
    router: str
    experts: str
    num_experts: int
    hidden: int
    width: int
    first: int
    expert_axes: dict[str, int]
    count_attributes: tuple[tuple[str, str], ...]
    bias: str | None
    rule: RoutingRule
    factored: bool = False

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return self.first * self.hidden + self.hidden * self.width

    def expert_paths(self) -> list[str]:
        """The tensors of the experts proper, biases included."""
        return [path for path in self.expert_axes if path.startswith(self.experts + ".")]

    def weight_paths(self) -> list[str]:
        """The experts' stacked matrices."""
        return [path for path in self.expert_paths() if not path.endswith("_bias")]

    def router_paths(self) -> list[str]:
        """Every other tensor with an expert axis: router rows, correction biases."""
        return [path for path in self.expert_axes if not path.startswith(self.experts + ".")]

    def block_of(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(self.block)

    def router_of(self, layer: nn.Module) -> nn.Module:
        return self.block_of(layer).get_submodule(self.router)

    def experts_of(self, layer: nn.Module) -> Any:
        return self.block_of(layer).get_submodule(self.experts)

    def bias_of(self, layer: nn.Module) -> torch.Tensor | None:
        return tensor_at(self.block_of(layer), self.bias).reshape(-1).float() if self.bias else None


def tensor_at(module: nn.Module, path: str) -> torch.Tensor:
    parent, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)


@torch.no_grad()
def keep_experts(block: nn.Module, site: MoeBlock, keep: tuple[int, ...]) -> None:
    """Delete all experts but `keep` from a block in place: weights, biases, router rows, correction biases and counts."""
    index = torch.tensor(keep)
    for path, axis in site.expert_axes.items():
        parent, _, leaf = path.rpartition(".")
        owner, tensor = block.get_submodule(parent), tensor_at(block, path)
        kept = tensor.index_select(axis, index.to(tensor.device))
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(kept, requires_grad=tensor.requires_grad)
        else:
            owner._buffers[leaf] = kept
    for path, attribute in site.count_attributes:
        owner = block.get_submodule(path)
        setattr(owner, attribute, getattr(owner, attribute) * len(keep) // site.num_experts)
