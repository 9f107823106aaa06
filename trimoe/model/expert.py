"""One expert of a stacked experts module, in any layout that transformers' decorator describes by flags.

Letters: S tokens, H hidden size, I expert width, O = 2I (gated) or I.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from trimoe.modeling_trimoe import first_projection


def matrices(experts: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(W_in [O, H], W_out [H, I]) of one expert in output-by-input orientation, gate and up stacked."""
    w_in, w_out = first_projection(experts)[expert], experts.down_proj[expert]
    return (w_in.mT, w_out.mT) if experts.is_transposed else (w_in, w_out)


def activate(experts: Any, expert: int, first_SO: torch.Tensor) -> torch.Tensor:
    """What the last projection is given, [S, I], from the first projection's product with the weights alone."""
    if experts.has_bias:
        first_SO = first_SO + getattr(experts, "gate_up_proj_bias" if experts.has_gate else "up_proj_bias")[expert]
    return experts._apply_gate(first_SO) if experts.has_gate else experts.act_fn(first_SO)


def run_expert(experts: Any, expert: int, x_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, y): the input of the last projection [S, I] and the output [S, H]."""
    w_in, w_out = matrices(experts, expert)
    h_SI = activate(experts, expert, F.linear(x_SH, w_in))
    y_SH = F.linear(h_SI, w_out)
    if experts.has_bias:
        y_SH = y_SH + experts.down_proj_bias[expert]
    if getattr(experts, "has_post_expert_norm", False):
        y_SH = experts.post_expert_norm(y_SH)
    return h_SI, y_SH


def by_expert(index_TK: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, where it stands in `index_TK`, flattened) for every expert that stands there. One wait for the device."""
    index_S = index_TK.reshape(-1)
    order_S = index_S.argsort(stable=True)
    start = 0
    for expert, end in enumerate(torch.bincount(index_S, minlength=count).cumsum(0).tolist()):
        if end > start:
            yield expert, order_S[start:end]
        start = end
