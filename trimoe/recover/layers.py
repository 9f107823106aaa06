"""Decoder layers that keep only what they are called with and compute the rest again in the backward pass (gradient checkpointing).

The numbers are the same to the bit: the same operations run on the same input. It costs a forward pass more (about a third of the time), so it is
done where what the layers keep would weigh beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Again = Callable[..., Any]  # (function, *arguments) -> what the function returns


def again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), of which the backward pass keeps the arguments alone."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), of which everything is kept."""
    return function(*args, **kwargs)


def checkpointed(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        layer.forward = partial(again, layer.forward)  # type: ignore[method-assign]
