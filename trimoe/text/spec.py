"""Which calibration text a recipe asks for, and how much of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CalibrationSpec:
    """Which text, and how much.

    data           one or several of: a file (text, JSON lines or array, parquet, table), `name=path`, `path#field`, a data set
                   `NAME:CONFIG/SPLIT#COLUMN` or `NAME[CONFIG](SPLIT):SAMPLES`, `builtin:mixed`, `builtin:english`, `builtin:docs`,
                   `builtin:code`
    samples        how many samples are drawn, from every text equally many and at least one
    length         tokens in a sample; cut to the model's context
    packing        documents that share a sample: `joined`, tokens see those of the document before; `separate`, they do not, and positions
                   start again (not for models with recurrent layers, and of the calibration text alone: training joins documents)
    search_tokens  tokens whose exact Gram is kept for searching; none given: 4,096, or so many that the mean expert has 256 of them
    search_memory  GiB that the Grams of one layer may take; fewer search tokens are taken, and said, where more would not fit
    """

    data: str | list[str] = "builtin:mixed"
    samples: Annotated[int, Field(ge=1)] = 128
    length: Annotated[int, Field(ge=2)] = 2048
    packing: Literal["joined", "separate"] = "joined"
    search_tokens: Annotated[int, Field(ge=16)] | None = None
    search_memory: Annotated[float, Field(gt=0, le=1e6)] = 2.0

    @property
    def sources(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else list(self.data)
