"""Whether what is computed stays within the range of its dtype, and what to say where it does not.

A number beyond the range becomes infinite, and NaN in the next product: it spreads over every token and makes scores that order nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimoe.errors import UserError
from trimoe.model.precision import dtype_name

WIDER = {torch.float16: "give --dtype bfloat16 or float32", torch.bfloat16: "give --dtype float32"}


class NotFinite(UserError):
    """A computation that leaves its dtype's range; the same command would meet it again."""


class Inside(NotFinite):
    """The same within a layer; the walk adds which one."""


class Range:
    """Watches tensors of one model for NaN and infinite numbers; nothing waits for the device before `check`."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.name, self.dtype = name, dtype
        self._ends: list[torch.Tensor] = []

    def see(self, tensor: torch.Tensor) -> None:
        """Take note of a tensor's smallest and largest number, one of which is not finite where any is not."""
        if tensor.numel():
            self._ends.append(torch.stack(tensor.aminmax()))

    def check(self, what: str) -> None:
        """Raises NotFinite where anything seen since the last check was not finite; `what` says which numbers these are, and where."""
        ends, self._ends = self._ends, []
        if ends and not bool(torch.stack(ends).isfinite().all()):
            raise NotFinite(f"{self.name}: {what} hold NaN or infinite numbers in {dtype_name(self.dtype)}; {advice(self.dtype)}.")

    def guard(self, model: nn.Module) -> None:
        """From now on `model` raises NotFinite where its logits are not finite; it waits for the device at every call."""

        def look(module: nn.Module, args: Any, output: Any) -> None:
            self.see(output.logits)
            self.check("the logits")

        model.register_forward_hook(look)


def checked(made: torch.Tensor, what: str, dtype: torch.dtype) -> torch.Tensor:
    """`made` if all of it is finite, else Inside; `what` names it in words, `dtype` is what it comes of. It waits for the device."""
    if made.numel() and not bool(torch.stack(made.aminmax()).isfinite().all()):
        raise Inside(f"{what} hold NaN or infinite numbers in {dtype_name(dtype)}; {advice(dtype)}.")
    return made


def advice(dtype: torch.dtype) -> str:
    """What a user can do about numbers that do not stay finite in this dtype."""
    return WIDER.get(dtype, "that is the widest dtype, so the model itself gives no usable numbers")
