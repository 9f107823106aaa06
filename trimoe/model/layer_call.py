"""What decoder layers are called with, and what they hand each other: found by running the model with stands in their places.

Most models give a layer the hidden states and things that no layer makes or changes: masks, positions. Some layers return something more, which
the next one is given (the choice of an indexer); that is carried along. Anything else that goes from layer to layer is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel as Model

from trimoe.errors import FOREIGN, UserError, stop_if_told

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a decoder layer is called with, after the hidden states
ROWS, LENGTH = 3, 4  # of the batch that is tried: no number of results that a layer may have
SMALL = 1 << 22  # numbers of a parameter outside the layers that are made up; larger ones are tables
MOST = 3  # results of a layer that are tried


@dataclass(frozen=True)
class Passed:
    """In a recorded call: what the layer before returned beside the hidden states, by its place there."""

    place: int


class Stand(nn.Module):
    """Takes a decoder layer's place: records the call, answers with its input or with a given tensor, and with `beside` marks."""

    def __init__(self, layer: nn.Module, answer: torch.Tensor | None = None, beside: int = 0):
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # attribute_type and the like are read off the layer by some models
        self.answer, self.beside = answer, beside
        self.seen = torch.empty(0)
        self.call: Call = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen, self.call = hidden_states, (args, kwargs)
        out = hidden_states if self.answer is None else self.answer
        return (out, *map(Passed, range(self.beside))) if self.beside else out


@contextmanager
def standing(layers: nn.ModuleList, stands: Sequence[nn.Module]) -> Iterator[None]:
    """While the stands are in the layers' places."""
    real = list(layers)
    for index, stand in enumerate(stands):
        layers[index] = stand
    try:
        yield
    finally:
        for index, layer in enumerate(real):
            layers[index] = layer


def with_passed(call: Call, rest: Sequence[Any]) -> Call:
    """A recorded call with what the layer before really returned."""
    args, kwargs = call

    def real(value: Any) -> Any:
        return rest[value.place] if isinstance(value, Passed) else value

    return tuple(map(real, args)), {name: real(value) for name, value in kwargs.items()}


def same(a: Any, b: Any) -> bool:
    """Whether two calls are equal, so that one copy serves both (without padding, masks depend on the length only)."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


# ---- how many, on paper


@torch.no_grad()
def passed_on(model: Model, layers: nn.ModuleList) -> int:
    """How many results a layer hands to the next beside the hidden states. Raises UserError where more than that goes from layer to layer;
    a model whose beginning does not run without weights is taken to hand on nothing."""
    if len(layers) < 2:
        return 0
    for beside in range(MOST):
        try:
            first, other, another = (_calls(model, layers, beside, *seeds) for seeds in ((0, 0), (0, 1), (1, 1)))
        except _Unfit:
            continue
        if first is None or other is None or another is None:
            return 0
        for index in range(1, len(layers)):
            if _shares(first[0][index]) or not same(first[0][index], other[0][index]):
                raise UserError(f"its decoder layer {index} is given what earlier layers computed beside the hidden states")
        if first[1] is not None and another[1] is not None and not same(first[1], another[1]):
            raise UserError("its head is given more than the last layer's hidden states")
        return beside
    raise UserError("its decoder layers hand each other more than hidden states")


class _Unfit(Exception):
    """The model does not take what the stands return."""


class _End(Exception):
    """The head was reached, and given `seen`."""

    def __init__(self, seen: torch.Tensor):
        super().__init__()
        self.seen = seen


class _Noise(Stand):
    """Returns random numbers instead of its input, which has to be what the one before returned."""

    def __init__(self, layer: nn.Module, before: _Noise | None, seed: int, beside: int):
        super().__init__(layer, beside=beside)
        object.__setattr__(self, "before", before)
        self.seed = seed

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before: _Noise | None = self.before  # type: ignore[assignment]
        given = isinstance(hidden_states, torch.Tensor)
        if before is not None and not (given and same(before.answer, hidden_states)):
            raise _Unfit
        self.call = (args, kwargs)
        self.answer = _random(hidden_states.shape, self.seed).to(hidden_states)
        return super().forward(hidden_states, *args, **kwargs)


class _RandomTable(nn.Module):
    """Random numbers instead of embeddings."""

    def __init__(self, hidden: int, dtype: torch.dtype, seed: int):
        super().__init__()
        self.hidden, self.dtype, self.seed = hidden, dtype, seed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _random((*ids.shape, self.hidden), self.seed).to(self.dtype)


class _Head(nn.Module):
    """Ends the run where logits would be made."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.empty(0, dtype=dtype)  # some models ask for its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise _End(hidden)


def _random(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _calls(model: Model, layers: nn.ModuleList, beside: int, table_seed: int, seed: int) -> tuple[list[Call], torch.Tensor | None] | None:
    """What each layer is called with where all layers but the last give random numbers of `seed`, and what the head is given then (None of a
    model that does not come to it); None where the model does not come to its first layer."""
    stands = list[_Noise]()
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        stands.append(_Noise(layer, stands[-1] if stands else None, 1 << 20 if last else 1000 * (seed + 1) + index, beside))
    table: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    inside = {id(parameter) for parameter in layers.parameters()} | {id(parameter) for parameter in table.parameters()}
    made = [
        (part, name, parameter) for part in model.modules() for name, parameter in part._parameters.items()
        if parameter is not None and id(parameter) not in inside and parameter.numel() <= SMALL
    ]  # fmt: skip
    try:
        for part, name, parameter in made:
            part._parameters[name] = nn.Parameter(torch.ones(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        model.set_input_embeddings(_RandomTable(table.weight.shape[1], table.weight.dtype, table_seed))
        if head is not None:
            model.set_output_embeddings(_Head(table.weight.dtype))
        with standing(layers, stands):
            ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % table.weight.shape[0]
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    except _End as end:
        if stands[-1].answer is None:
            raise _Unfit from None  # some layers were not called
        return [stand.call for stand in stands], end.seen
    except FOREIGN as error:
        stop_if_told(error)
        if stands[0].answer is None:
            return None
        if stands[-1].answer is None:
            raise _Unfit from None
    finally:
        model.set_input_embeddings(table)
        if head is not None:
            model.set_output_embeddings(head)
        for part, name, parameter in made:
            part._parameters[name] = parameter
    return [stand.call for stand in stands], None


def _shares(call: Call) -> bool:
    """Whether a call has something that layers could put results into for each other."""
    args, kwargs = call
    return any(isinstance(value, (dict, list)) and (not value or type(value) not in (dict, list)) for value in (*args, *kwargs.values()))
