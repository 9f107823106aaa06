"""Experts in 4 or 8 bits: Expert Slimming, arXiv 2406.02500; GPTQ arXiv 2210.17323, AWQ arXiv 2306.00978.

As in low_rank, an expert is two matrices: the first projection with gate and up stacked, W_in [O, H], and the last, W_out [H, I].

Letters: S routed tokens of one expert, H hidden size, I expert width, O = 2I (gated) or I.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from trimoe.checkpoint.packed import Packed
from trimoe.errors import UserError
from trimoe.methods.fitting import LayerFit
from trimoe.methods.method import Fitted, Topic
from trimoe.methods.quantize.rounding import awq_scale, clipped, common_group, gptq, rounded
from trimoe.model.decision import Decisions, LayerDecision
from trimoe.model.expert import activate, matrices
from trimoe.model.moe_block import MoeBlock
from trimoe.modeling_trimoe import first_projection
from trimoe.walk.expert_inputs import FEW, ExpertInputs, LayerInputs

KERNEL_GROUPS = (32, 64, 128)  # inputs that share a scale in vLLM's and torch's kernels
SMALLEST = 8  # inputs in a group: below, the scales weigh as much as the integers save


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Quantize(Fitted):
    """Store each expert's weights as integers with a scale per group of inputs; routers, norms, embeddings and the head stay.

    bits     4 or 8
    group    inputs that share a scale; where it does not divide every expert's widths, the largest smaller one of 32, 64 and 128 that does
             (engines' kernels know these), else the largest number that does
    method   `gptq`: rounding errors are made up for on the expert's own inputs; `awq`: inputs that fire much get finer steps, ranges
             are clipped; `round`: to the nearest, without calibration text
    scope    `experts`: the routed ones alone; `all-linear`: the decoder layers' other matrices too (attention, shared experts, dense MLPs),
             except those whose inputs the group does not divide

    Each expert's last projection is fitted to what the quantised first one gives it. With `awq`, the input scale of the last projection
    is folded into the up rows of the first, where that is exact (gated linearly, no bias); the first projection is clipped only, because
    its input scale would go into the norm, which the router and the shared experts read too. So are the matrices outside the experts.
    """

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "arXiv 2406.02500"
    label: ClassVar[str | None] = "Quantise"
    trainable: ClassVar[bool] = False  # integers are not

    bits: Literal[4, 8] = 4
    group: Annotated[int, Field(ge=SMALLEST)] = 128
    method: Literal["gptq", "awq", "round"] = "gptq"
    scope: Literal["experts", "all-linear"] = "experts"

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read."""
        return self.method != "round"

    # ---- on paper

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        self.refuse_factored(sites, decisions)
        if self.group_of(sites.values()) < SMALLEST:
            widths = sorted({width for site in sites.values() for width in (site.hidden, site.width)})
            raise UserError(
                f"quantize: no group of {SMALLEST} to {self.group} inputs divides the experts' widths {widths}; leave quantize out."
            )

    def group_of(self, sites: Iterable[MoeBlock]) -> int:
        """The one group size of the whole model, because checkpoints in this format are read with one: as asked for if it divides every width,
        else the largest smaller one that kernels know, else the largest that divides."""
        widths = [width for site in sites for width in (site.hidden, site.width)]
        most = common_group(widths, self.group)
        known = [group for group in KERNEL_GROUPS if group <= self.group and common_group(widths, group) == group]
        return most if most == self.group or not known else max(known)

    def forms(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> Decisions:
        """Bits and group of every layer that has experts left."""
        group = self.group_of(sites.values())
        return {index: replace(decisions[index], bits=self.bits, group=group) for index in sites}

    def takes(self, sites: Iterable[MoeBlock], module: nn.Linear) -> bool:
        """Whether a matrix outside the experts can be in integers too."""
        return module.in_features % self.group_of(sites) == 0

    def made_bytes(self, site: MoeBlock, decision: LayerDecision, itemsize: int) -> int:
        return 3 * super().made_bytes(site, decision, 1)  # int8, stacked, packed

    def cautions(self, sites: Mapping[int, MoeBlock]) -> dict[Topic, str]:
        if self.bits == 8:
            return {"speed": "8-bit experts run weight-only; run trimoe bench before you count on speed."}
        return {
            "speed": "4-bit experts speed up single-stream decoding (1.9 to 2.2 times here); weight-only kernels halve the speed of prefill."
        }

    def fit(self, layer: LayerFit) -> tuple[Any, dict[str, Any]]:
        """The integers of all the layer's experts and linears; the layer computes with them from here on."""
        group, part, packed = layer.decision.group or 0, layer.part, QuantizedLayer()
        if part is not None:
            own = QuantizedLayer()
            if not part.empty:
                own = self.transform(part.experts, part.site, part.seen, group, layer.stored(None))
            for other in part.team.everyone(own):
                packed.first += other.first
                packed.last += other.last
                packed.borrowed += other.borrowed
            put_back(part.whole, packed)
        packed.linears |= layer.each_linear(lambda path: self.linear(layer.weights[path], layer.moments[path], group, layer.stored(path)))
        for path, weight in layer.weights.items():
            weight.copy_(packed.linears[path].dense())
        return packed, {"borrowed": packed.borrowed}

    # ---- tensors in, tensors out

    @torch.no_grad()
    def transform(self, experts: Any, site: MoeBlock, seen: LayerInputs | None, group: int, dtype: torch.dtype) -> QuantizedLayer:
        """The integers and scales (in `dtype`) of one layer's experts, which stay as they are. `site` and `experts` are those after
        dropping; `seen` is what the layer's block saw; `round` does without."""
        layer = QuantizedLayer()
        up_rows = linear_rows(experts, site.first) if self.method == "awq" else None
        for expert in range(site.num_experts):
            w_in, w_out = matrices(experts, expert)
            if self.method == "round":
                layer.first.append(rounded(w_in, self.bits, group, dtype))
                layer.last.append(rounded(w_out, self.bits, group, dtype))
                continue
            assert seen is not None
            given = seen.of(expert)
            layer.borrowed += len(given.gate_S) < FEW
            solve = gptq if self.method == "gptq" else clipped
            moment = given.moment
            first = solve(w_in, moment, self.bits, group, dtype)
            if up_rows is not None:
                s_I = awq_scale(w_out, _inner_moment(experts, expert, given, first), self.bits, group, dtype)
                w_in, w_out = folded(w_in, w_out, s_I, up_rows)
                first = solve(w_in, moment, self.bits, group, dtype)
            layer.first.append(first)
            layer.last.append(solve(w_out, _inner_moment(experts, expert, given, first), self.bits, group, dtype))
        return layer

    @torch.no_grad()
    def linear(self, w_OI: torch.Tensor, moment_II: torch.Tensor | None, group: int, dtype: torch.dtype) -> Packed:
        """A matrix outside the experts; without a moment of its inputs it is rounded."""
        if moment_II is None or self.method == "round":
            return rounded(w_OI, self.bits, group, dtype)
        return (gptq if self.method == "gptq" else clipped)(w_OI, moment_II, self.bits, group, dtype)


@plain_dataclass
class QuantizedLayer:
    """Per expert its first [O, H] and last [H, I] projection; `borrowed` experts saw fewer than 128 tokens and leaned on the layer's.
    `linears`: the layer's other matrices by module path."""

    first: list[Packed] = field(default_factory=list)
    last: list[Packed] = field(default_factory=list)
    linears: dict[str, Packed] = field(default_factory=dict)
    borrowed: int = 0


@torch.no_grad()
def put_back(experts: Any, layer: QuantizedLayer) -> None:
    """Write the dequantised weights into the experts' stacked parameters, in place."""
    for expert, (first, last) in enumerate(zip(layer.first, layer.last, strict=True)):
        for parameter, packed in ((first_projection(experts), first), (experts.down_proj, last)):
            dense = packed.dense()
            parameter[expert].copy_(dense.mT if experts.is_transposed else dense)


def folded(w_in: torch.Tensor, w_out: torch.Tensor, s_I: torch.Tensor, up_rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The same expert, float32, with the inputs of its last projection divided by s: by its up rows. W_out diag(s) undoes it."""
    w_in = w_in.float().clone()
    w_in[up_rows] /= s_I.unsqueeze(1)
    return w_in, w_out.float() * s_I


def linear_rows(experts: Any, first: int) -> slice | None:
    """The rows of the first projection whose scaling by c > 0 scales its activation by c, None if there are none (or a bias is).

    Tried on numbers large enough to meet any clamp: some gates clamp, some add one to `up`.
    """
    if experts.has_bias:
        return None
    rows = slice(None) if not experts.has_gate else slice(first // 2, None) if experts.is_concatenated else slice(1, None, 2)
    like = experts.down_proj
    value = 64 * torch.randn(16, first, generator=torch.Generator().manual_seed(0)).to(like.device, torch.float32)
    half = value.clone()
    half[:, rows] *= 0.5
    linear = torch.allclose(activate(experts, 0, half), 0.5 * activate(experts, 0, value), rtol=1e-5, atol=1e-6)
    return rows if linear else None


def _inner_moment(experts: Any, expert: int, given: ExpertInputs, first: Packed) -> torch.Tensor:
    """The second moment of what the last projection gets from the quantised first one."""
    h, pool_h = (activate(experts, expert, x @ first.dense(x.dtype).T) for x in (given.x_SH, given.pool_PH))
    return given.blended(h, h, pool_h, pool_h)
