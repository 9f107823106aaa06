"""Runs checkpoints whose experts lie in packed integers without ever expanding the model: the integers go to a kernel as they are read.

The experts keep transformers' own module and dispatch (generate, caches and adapters see nothing unusual); its stacked weights are
empty, and a matrix per expert and projection, each in the form that a backend's kernel wants, hangs on the module instead. Backends:

    int4-weight-only   CPU and CUDA    the stored 4-bit integers and scales as they are, computed in bf16. The smallest.
    int8-weight-only   CPU and CUDA    the stored 8-bit integers and scales as they are, computed in bf16.
    dequantize         everywhere      one matrix at a time is expanded when its expert is used. Exact, differentiable, slow.
    int8-dynamic       CPU (fbgemm)    int8 x int8. Weights and activations are rounded once more (see Int8Dynamic), so the model is another
                                       than the one that trimoe eval measures: only by name.

Letters: O outputs, I inputs of a matrix, G groups along I; T tokens, k experts a token, S = T k pairs or those of one expert, E experts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from trimoe.checkpoint.packed import Packed, pack, unpack
from trimoe.errors import UserError
from trimoe.model import transformers5
from trimoe.model.expert import by_expert

NAME = "trimoe_packed"
KERNEL_GROUPS = (32, 64, 128, 256)  # inputs a scale, of torch's int4 kernels


class Backend(Protocol):
    """One way to multiply by a packed matrix. `pack` makes the kernel's form on the device that the integers lie on."""

    name: str
    exact: bool = False  # whether results equal those of the dequantised matrix, and gradients flow to the input

    def fits(self, bits: int, group: int, shape: tuple[int, int], device: torch.device) -> bool:
        """Whether matrices [O, I] of `bits` in groups of `group` can run here."""
        ...

    def pack(self, packed: Packed) -> Any: ...

    def linear(self, x_SI: torch.Tensor, handle: Any) -> torch.Tensor:
        """x W^T [S, O] in the dtype of x; S > 0."""
        ...

    def nbytes(self, handle: Any) -> int:
        """Bytes that the handle holds in memory."""
        return sum(part.numel() * part.element_size() for part in handle if isinstance(part, torch.Tensor))


class Int8Dynamic(Backend):
    """fbgemm: int8 weights with a scale a row, activations rounded to 7 bits at each call (the eighth could overflow without VNNI).

    Groups become one scale a row: w = q s_group is rounded to multiples of max|w| / 127, so a weight moves by at most 1/254 of its row's
    largest. Measured on Gaussian matrices, that adds 0.07 of the stored rounding error to 4 bits and 1.2 to 1.4 of it to 8 bits in groups;
    one group a row stays as it is. The activations' rounding is the larger: outputs differ by 0.016 to 0.018 of their norm.
    """

    name = "int8-dynamic"

    def fits(self, bits: int, group: int, shape: tuple[int, int], device: torch.device) -> bool:
        return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines

    def pack(self, packed: Packed) -> Any:
        q_OI, scale_O = per_row(packed)
        rows = len(q_OI)
        zeros_O = torch.zeros(rows, dtype=torch.int64)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"  # decides the form of the packed matrix; multiplying does not look at it
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # such tensors are to leave torch one day: nothing the user could act on
                w_OI = torch._make_per_channel_quantized_tensor(q_OI, scale_O.double(), zeros_O, 0)
            return torch.ops.quantized.linear_prepack(w_OI, None), q_OI.numel() + 12 * rows  # scale, zero and sum of each row
        finally:
            torch.backends.quantized.engine = before

    def linear(self, x_SI: torch.Tensor, handle: Any) -> torch.Tensor:
        x = x_SI.float()
        if len(x) == 1:
            return torch.ops.quantized.linear_dynamic(x, handle[0], True).to(x_SI.dtype)
        # fbgemm rounds all rows with one step: without this, one loud token would silence the others.
        size_S1 = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.ops.quantized.linear_dynamic(x / size_S1, handle[0], True).mul_(size_S1).to(x_SI.dtype)

    def nbytes(self, handle: Any) -> int:
        return handle[1]


class Int4WeightOnly(Backend):
    """Exactly the stored integers and groups. torch's kernels read bf16 scales (others are rounded) and inputs; w = (unsigned - 8) scale."""

    name = "int4-weight-only"
    device, rows = "cpu", 16

    def fits(self, bits: int, group: int, shape: tuple[int, int], device: torch.device) -> bool:
        rows, columns = shape
        return bits == 4 and device.type == self.device and group in KERNEL_GROUPS and rows % self.rows == 0 and columns % group == 0

    def pack(self, packed: Packed) -> Any:
        scale_GO = packed.scale_OG.to(torch.bfloat16).T
        return self.words(packed.q_OI), torch.stack([scale_GO, torch.zeros_like(scale_GO)], dim=-1).contiguous(), packed.group

    def words(self, q_OI: torch.Tensor) -> torch.Tensor:
        return torch._convert_weight_to_int4pack_for_cpu(q_OI.int() + 8, 1)

    def linear(self, x_SI: torch.Tensor, handle: Any) -> torch.Tensor:
        words, scale_GO2, group = handle
        return torch._weight_int4pack_mm_for_cpu(x_SI.to(torch.bfloat16), words, group, scale_GO2).to(x_SI.dtype)


class Int4WeightOnlyCuda(Int4WeightOnly):
    """The same on CUDA, compute capability 8.0 and up. In its input the first of two values lies in the high bits."""

    device, rows = "cuda", 8

    def fits(self, bits: int, group: int, shape: tuple[int, int], device: torch.device) -> bool:
        return super().fits(bits, group, shape, device) and torch.cuda.get_device_capability(device) >= (8, 0)

    def words(self, q_OI: torch.Tensor) -> torch.Tensor:
        fields = (q_OI + 8).to(torch.uint8)
        tiles = next(tiles for tiles in (8, 4, 2) if q_OI.shape[1] % (16 * tiles) == 0)  # 2 always divides: groups are multiples of 32
        return torch._convert_weight_to_int4pack((fields[:, 0::2] << 4 | fields[:, 1::2]).contiguous(), tiles)

    def linear(self, x_SI: torch.Tensor, handle: Any) -> torch.Tensor:
        words, scale_GO2, group = handle
        return torch._weight_int4pack_mm(x_SI.to(torch.bfloat16).contiguous(), words, group, scale_GO2).to(x_SI.dtype)


class Int8WeightOnly(Backend):
    """Exactly the stored integers and groups: torch's kernel has a scale a row, so each group is a product of its own. bf16 scales and
    inputs, sums of groups in float32."""

    name = "int8-weight-only"

    def fits(self, bits: int, group: int, shape: tuple[int, int], device: torch.device) -> bool:
        whole = group % 32 == 0 and shape[1] % group == 0  # elsewhere the CPU kernel reads past its rows
        return bits == 8 and device.type in ("cpu", "cuda") and whole

    def pack(self, packed: Packed) -> Any:
        q_GOI = packed.q_OI.unflatten(1, (-1, packed.group)).transpose(0, 1).contiguous()
        return q_GOI, packed.scale_OG.to(torch.bfloat16).T.contiguous()

    def linear(self, x_SI: torch.Tensor, handle: Any) -> torch.Tensor:
        q_GOI, scale_GO = handle
        parts = x_SI.to(torch.bfloat16).split(q_GOI.shape[-1], dim=1)
        y_SO = torch._weight_int8pack_mm(parts[0].contiguous(), q_GOI[0], scale_GO[0])
        if len(parts) > 1:
            y_SO = y_SO.float()
        for x, q_OI, scale_O in zip(parts[1:], q_GOI[1:], scale_GO[1:], strict=True):
            y_SO += torch._weight_int8pack_mm(x.contiguous(), q_OI, scale_O)
        return y_SO.to(x_SI.dtype)


class Dequantize(Backend):
    """The words of the checkpoint stay as they are; W is made for each call and forgotten."""

    name = "dequantize"
    exact = True

    def fits(self, bits: int, group: int, shape: tuple[int, int], device: torch.device) -> bool:
        return True

    def pack(self, packed: Packed) -> Any:
        return pack(packed.q_OI, packed.bits), packed.scale_OG.contiguous(), packed.bits, packed.group

    def linear(self, x_SI: torch.Tensor, handle: Any) -> torch.Tensor:
        words, scale_OG, bits, group = handle
        q_OI = unpack(words, bits, scale_OG.shape[1] * group)
        return F.linear(x_SI, Packed(q_OI, scale_OG, bits, group).dense(x_SI.dtype))


# "auto" takes the first that fits: weight-only, or dequantize where no kernel allows the group size. int8-dynamic is taken by name alone.
BACKENDS: tuple[Backend, ...] = (Int4WeightOnly(), Int4WeightOnlyCuda(), Int8WeightOnly(), Dequantize(), Int8Dynamic())


def per_row(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 integers [O, I] and one float32 scale a row; the stored ones where there is one group, else the nearest."""
    if packed.scale_OG.shape[1] == 1:
        return packed.q_OI, packed.scale_OG[:, 0].float()
    w_OI = (packed.q_OI.float().unflatten(1, (-1, packed.group)) * packed.scale_OG.float().unsqueeze(-1)).flatten(1)
    scale_O = (w_OI.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return w_OI.div_(scale_O.unsqueeze(1)).round_().to(torch.int8), scale_O


def check_backend(name: str) -> None:
    if name not in ("auto", *(backend.name for backend in BACKENDS)):
        raise UserError(f"There is no backend {name!r}; there are: auto, {', '.join(_names(BACKENDS))}.")


def choose(name: str, bits: int, group: int, shape: tuple[int, int], device: torch.device) -> Backend:
    """The backend called `name`, or for "auto" the first that can run such matrices here."""
    check_backend(name)
    able = [backend for backend in BACKENDS if backend.fits(bits, group, shape, device)]
    wanted = able if name == "auto" else [backend for backend in able if backend.name == name]
    if not wanted:
        raise UserError(
            f"The backend {name!r} cannot run matrices of {shape[0]} x {shape[1]} with {bits} bits in groups of {group} on {device.type}; "
            f"these can: {', '.join(_names(able))}."
        )
    return wanted[0]


def _names(backends: Any) -> list[str]:
    return list(dict.fromkeys(backend.name for backend in backends))


@dataclass(frozen=True)
class Matrix:
    """One matrix in the form that its backend wants."""

    backend: Backend
    handle: Any
    count: int  # weights in it

    def __call__(self, x_SI: torch.Tensor) -> torch.Tensor:
        return self.backend.linear(x_SI, self.handle)

    @property
    def nbytes(self) -> int:
        return self.backend.nbytes(self.handle)


class PackedLinear(nn.Linear):
    """A linear whose matrix is packed; its weight is empty."""

    def __init__(self, linear: nn.Linear, matrix: Matrix):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        self.weight = nn.Parameter(linear.weight.new_empty(0, device=linear.weight.device), requires_grad=False)
        self.bias, self.trimoe_matrix = linear.bias, matrix

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        _refuse_gradients(input, self.trimoe_matrix.backend)
        y = self.trimoe_matrix(input.reshape(-1, self.in_features)).view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _refuse_gradients(given: torch.Tensor, backend: Backend) -> None:
    if given.requires_grad and torch.is_grad_enabled() and not backend.exact:
        raise UserError(f"Gradients do not pass through {backend.name}; load the model with backend='dequantize' to train it.")


def _one_expert(self: Any, expert: int, x_SH: torch.Tensor) -> torch.Tensor:
    first = self.trimoe_first[expert](x_SH)
    if self.has_bias:
        first = first + getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias")[expert]
    y_SH = self.trimoe_down[expert](self._apply_gate(first) if self.has_gate else self.act_fn(first))
    if self.has_bias:
        y_SH = y_SH + self.down_proj_bias[expert]
    return self.post_expert_norm(y_SH) if getattr(self, "has_post_expert_norm", False) else y_SH


def packed_experts(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The experts function: each expert on its routed tokens, in any layout that the stock module describes."""
    _refuse_gradients(hidden_states, self.trimoe_first[0].backend)
    top_k = top_k_index.shape[-1]
    if len(top_k_index) == 1:  # decoding: nothing to sort
        y_KH = torch.cat([_one_expert(self, expert, hidden_states) for expert in top_k_index[0].tolist()])
        return (top_k_weights.to(y_KH.dtype) @ y_KH).to(hidden_states.dtype)
    order, parts = [], []
    for expert, pairs in by_expert(top_k_index, self.num_experts):
        order.append(pairs)
        parts.append(_one_expert(self, expert, hidden_states[pairs // top_k]))
    order_S = torch.cat(order)
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    weighted_SH = torch.cat(parts)[back_S] * top_k_weights.reshape(-1, 1)
    return weighted_SH.view(-1, top_k, weighted_SH.shape[-1]).sum(1).to(hidden_states.dtype)


transformers5.register_experts(NAME, packed_experts)
