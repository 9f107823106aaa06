"""Decoder layers that take little memory while they train: what they keep for the backward pass, and where frozen weights are.

`checkpointed` layers keep only what they are called with and compute the rest again in the backward pass (gradient
checkpointing). `Offloaded` ones leave their frozen weights in the checkpoint's files: a layer's are read when it runs, also when
it computes again, and are gone afterwards, so one layer at a time is in memory. Either way the numbers are the same to the bit:
the same operations run on the same input. Computing again costs a forward pass more (about a third of the time), reading costs
what the disk, or the system's cache of it, takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton
from trimoe.walk.walk import LayerWalk

Again = Callable[..., Any]  # (function, *arguments) -> what the function returns
Change = Callable[[torch.Tensor], Any]  # what is done to a weight in place once it is read


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


class Offloaded:
    """A model whose decoder layers are read from `skeleton`'s files as they run.

    The parameters named `trained`, buffers, and what lies outside the layers are in memory. In the place of another weight stands
    one zero in its shape, dtype and device. `changes` says what is done to a weight, by its full name, whenever it is read.
    """

    def __init__(self, skeleton: Skeleton, trained: Collection[str], device: str | torch.device):
        self.skeleton, self.changes = skeleton, dict[str, Change]()
        self.walk = LayerWalk(skeleton, [], device=device)
        self.model: Any = copy.deepcopy(skeleton.model)
        _, layers = transformers5.decoder_layers(self.model)
        inside = [f"{skeleton.layer_name(index)}.{name}" for index, layer in enumerate(layers) for name, _ in layer.named_buffers()]
        for keys in (*([key] for key in skeleton.outer_keys), *map(skeleton.source_keys, (*inside, *trained))):
            if keys:
                transformers5.load_into(self.model, skeleton.checkpoint.read_together(keys), self.walk.device, skeleton.dtype)
        for name, source in skeleton.ties.items():
            transformers5.share(self.model, name, source)
        self._places = [list(_standing(layer, self.walk.device)) for layer in layers]
        for index, layer in enumerate(layers):
            layer.forward = partial(again, partial(self._run, index, layer.forward))  # type: ignore[method-assign]
        self.model.requires_grad_(False)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full names and numbers of what is not in memory, read one layer at a time."""
        for index, places in enumerate(self._places):
            with self.walk.layer(index) as layer:
                yield from ((f"{self.skeleton.layer_name(index)}.{path}", layer.get_parameter(path)) for path, *_ in places)

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._filled(index):
            return forward(*args, **kwargs)

    @contextmanager
    def _filled(self, index: int) -> Iterator[None]:
        """One layer's weights in their places."""
        with self.walk.layer(index) as layer:
            for path, module, leaf, _ in self._places[index]:
                weight = layer.get_parameter(path)
                weight.requires_grad_(False)  # transformers loads what may train
                change = self.changes.get(f"{self.skeleton.layer_name(index)}.{path}")
                if change is not None:
                    with torch.no_grad():
                        change(weight)
                module._parameters[leaf] = weight
            try:
                yield
            finally:
                for _, module, leaf, stand in self._places[index]:
                    module._parameters[leaf] = stand


def _standing(layer: nn.Module, device: torch.device) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Put a stand-in into the place of every weight that a layer lacks. Yields the weight's name in the layer, its module and its
    name in that, and the stand-in."""
    for path, weight in list(layer.named_parameters()):
        if weight.is_meta:
            owner, _, leaf = path.rpartition(".")
            zero = torch.zeros((), dtype=weight.dtype, device=device).expand(weight.shape)
            module = layer.get_submodule(owner)
            module._parameters[leaf] = stand = nn.Parameter(zero, requires_grad=False)
            yield path, module, leaf, stand
