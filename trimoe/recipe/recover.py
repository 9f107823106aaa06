"""How a compressed model is trained to win back what it lost: the `recover` section of a recipe, and `trimoe recover`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trimoe.errors import UserError

RATES = {"lora": 5e-4, "router": 1e-3, "logits": 5e-4, "experts": 1e-3}  # peak learning rates where a recipe names none
FULL_RATE = 2e-5  # where all weights train


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Recover:
    """Recovery training of a finished folder.

    method       `lora`: adapters on attention and experts, trained on the text itself (MoE-I2); `sft`: all weights, trained on the text
                 itself (the holistic study); `logits`: distillation of the original's
                 next-token distribution into adapters, or into all weights with `train: full`; `router`: the same, but only routers
                 train; `experts`: each expert learns its original's outputs on the original's hidden states, layer by layer (MoE-Pruner)
    data         training text: files, data sets by name or builtin:NAME; the recipe's calibration text by default
    samples      how many sequences
    length       tokens in a sequence; cut to the model's context
    holdout      share of the sequences that is kept apart for validation
    epochs       passes over the samples
    steps        optimiser steps, at most (of each layer, for `experts`)
    batch        sequences in one optimiser step
    rate         peak learning rate of a cosine schedule; null: by method
    warmup       share of the steps in which the rate rises
    clip         gradient norm, at most
    rank, alpha  of the adapters
    train        `lora`: adapters; `full`: all weights (`logits` only)
    temperature  of both distributions in distillation
    top_k        probabilities of the original that are kept a token; the rest is one class
    patience     validations (ten a run) without improvement after which training stops; the best state is what is written. At a high rate
                 the numbers get worse before they get better
    adapter      keep the adapters beside the untouched model (peft's format) instead of merging them
    dtype        float32 or bfloat16, in which the model computes; null: bfloat16 where a checkpoint is stored so and trains on a GPU. What
                 trains is float32 in any case (adapters, or masters of weights), and its optimiser
    stream       `experts`: layer by layer, neither model is held in memory; false: both are, and the language-modelling loss is
                 added, as the paper does. Other methods, where weights are frozen: true reads a layer's from the files each time that it
                 runs, so that one layer is in memory; false holds the model; null: it is held where that fits
    """

    method: Literal["lora", "sft", "router", "logits", "experts"]
    data: str | list[str] | None = None
    samples: Annotated[int, Field(ge=2)] = 1024
    length: Annotated[int, Field(ge=8)] = 512
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.05
    epochs: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    batch: Annotated[int, Field(ge=1)] = 8
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32.0
    train: Literal["lora", "full"] = "lora"
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=1)] = 64
    patience: Annotated[int, Field(ge=1)] = 8
    adapter: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    stream: bool | None = None

    def __post_init__(self) -> None:
        if self.train == "full" and self.method != "logits":
            raise ValueError(f"train: full goes with method logits, not with {self.method}; on the text itself, sft trains all weights.")
        if self.adapter and (self.method not in ("lora", "logits") or self.train == "full"):
            raise ValueError("adapter: true (--adapter) keeps adapters, which only method lora and method logits with train: lora have.")
        if self.stream and self.whole:
            raise ValueError(
                "stream: true leaves frozen weights in their files, and here all weights train; adapters, router and experts stream."
            )

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        if self.rate is not None:
            return self.rate
        return FULL_RATE if self.whole else RATES[self.method]

    @property
    def by_layer(self) -> bool:
        """Whether each layer is a problem of its own."""
        return self.method == "experts" and self.stream is not False

    @property
    def whole(self) -> bool:
        """Whether all weights train."""
        return self.method == "sft" or self.train == "full"

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def parsed(spec: Recover | dict[str, Any]) -> Recover:
    """The section as given or from a mapping. Raises UserError where it is none."""
    if isinstance(spec, Recover):
        return spec
    try:
        return TypeAdapter(Recover).validate_python(spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise UserError(f"recover{f'.{where}' if where else ''}: {message[0].lower()}{message[1:]}.") from None


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak rate: linear up over the first `warmup` of the steps, then half a cosine down to 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
