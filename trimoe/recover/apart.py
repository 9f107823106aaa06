"""Adapters of stacked weights as products of their own: x W + s (x A^T) B^T, where peft makes W + s B A of every stack in every step.

A stack is most of a model. peft's way keeps all sums until the backward pass, twice the model at least; here nothing of a stack's size is
made. Names, files and merging stay peft's.

Letters: T tokens, k experts a token, S = T k pairs sorted by expert, E experts, H hidden size, I expert width, O width of the first projection,
r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear

from trimoe.model import transformers5
from trimoe.modeling_trimoe import FactoredExperts, first_projection

ADAPTER = "default"  # peft's name of the only one
ALIGNED = 8  # numbers in a row of a factor are a multiple of it: grouped products on a GPU want 16 bytes


def take_apart(adapted: nn.Module) -> list[nn.Module]:
    """Let linear modules and stacked experts whose parameters have adapters compute them apart. Returns the modules whose forward was
    replaced. Factored experts keep peft's way: their factors are small."""
    from peft.tuners.lora.layer import ParamWrapper

    replaced: list[nn.Module] = []
    stacks: dict[nn.Module, dict[str, Any]] = {}
    for wrapper in [module for module in adapted.modules() if isinstance(module, ParamWrapper)]:
        base: Any = wrapper.get_base_layer()
        if isinstance(base, nn.Linear):
            wrapper.forward = partial(_linear, wrapper)  # type: ignore[method-assign]
        elif transformers5.is_decorated(base) and not isinstance(base, FactoredExperts):
            wrapper.forward = partial(_through, wrapper)  # type: ignore[method-assign]
            stacks.setdefault(base, {})[wrapper.parameter_name] = wrapper
        else:
            continue
        replaced.append(wrapper)
    for base, wrappers in stacks.items():
        base.forward = partial(adapted_experts, base, wrappers)  # type: ignore[method-assign]
        replaced.append(base)
    return replaced


def put_back(replaced: list[nn.Module]) -> None:
    for module in replaced:
        del module.forward


@torch.no_grad()
def add(weight: torch.Tensor, wrapper: Any, stored: torch.dtype) -> None:
    """Add an adapter's product to a weight in place, matrix by matrix in float32, and round each to `stored`."""
    matrices = [weight] if weight.dim() == 2 else list(weight)
    for matrix, added in zip(matrices, _deltas(wrapper, weight), strict=True):
        matrix.copy_((matrix.float() + added).to(stored))


def _deltas(wrapper: Any, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """s B A of a matrix, or of each in a stack, in its shape."""
    count = 1 if weight.dim() == 2 else len(weight)
    a, b, scale = wrapper.lora_A[ADAPTER].weight.float(), wrapper.lora_B[ADAPTER].weight.float(), wrapper.scaling[ADAPTER]
    transposed = weight.dim() == 3 and wrapper.get_base_layer().is_transposed
    for number in range(count):
        product = (b.reshape(len(b), -1, count)[..., number] @ a.reshape(count, -1, a.shape[-1])[number]) * scale
        yield product.mT if transposed else product


def _linear(wrapper: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = wrapper.lora_A[ADAPTER].weight.to(x.dtype), wrapper.lora_B[ADAPTER].weight.to(x.dtype)
    return wrapper.base_layer(x) + F.linear(F.linear(x, a), b) * wrapper.scaling[ADAPTER]


def _through(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    return wrapper.base_layer(*args, **kwargs)


def adapted_experts(
    self: Any, wrappers: dict[str, Any], hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """As transformers' grouped experts, with the adapters' products beside those of the stacks."""
    top_k, count = top_k_index.shape[-1], self.num_experts
    expert_S, order_S = torch.sort(top_k_index.reshape(-1), stable=True)
    ends_E = torch.bincount(expert_S, minlength=count).cumsum(0, dtype=torch.int32)
    x_SH = hidden_states[order_S // top_k]

    def project(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert_S] if self.has_bias else None
        y = _grouped_linear(x, weight, ends_E, bias=bias, is_transposed=self.is_transposed)
        return y if name not in wrappers else y + _low_rank(wrappers[name], x, ends_E, count)

    first_SO = project(x_SH, first_projection(self), "gate_up_proj" if self.has_gate else "up_proj")
    h_SI = self._apply_gate(first_SO) if self.has_gate else self.act_fn(first_SO)
    y_SH = project(h_SI, self.down_proj, "down_proj")
    y_SH = self.post_expert_norm(y_SH) if getattr(self, "has_post_expert_norm", False) else y_SH
    weighted_SH = y_SH * top_k_weights.reshape(-1)[order_S].unsqueeze(-1)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return weighted_SH[back_S].view(-1, top_k, weighted_SH.shape[-1]).sum(1).to(hidden_states.dtype)


def _low_rank(wrapper: Any, x_SI: torch.Tensor, ends_E: torch.Tensor, count: int) -> torch.Tensor:
    """s (x A_e^T) B_e^T of every row and its expert, in the dtype of x."""
    a, b = wrapper.lora_A[ADAPTER].weight.to(x_SI.dtype), wrapper.lora_B[ADAPTER].weight.to(x_SI.dtype)
    a_ErI, b_ErO = a.view(count, -1, a.shape[-1]), b.view(len(b), -1, count).permute(2, 1, 0)
    more = -a_ErI.shape[1] % ALIGNED
    a_ErI, b_ErO = F.pad(a_ErI, (0, 0, 0, more)), F.pad(b_ErO, (0, 0, 0, more)).contiguous()
    low_Sr = _grouped_linear(x_SI, a_ErI, ends_E)
    return _grouped_linear(low_Sr, b_ErO, ends_E, is_transposed=True) * wrapper.scaling[ADAPTER]
