"""What can be said of how expert_drop chooses: searches inside a layer, and the receptive field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
Drop = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Genetic:
    """MoE-I2's search over sets of experts: elitist, children drawn from the union of two parents, then single swaps.

    population       sets in a generation
    generations      how many generations, at most
    max_evaluations  losses computed in one layer, at most
    """

    population: Annotated[int, Field(ge=4, le=100_000)] = 100
    generations: Annotated[int, Field(ge=1, le=100_000)] = 50
    max_evaluations: Annotated[int, Field(ge=1)] = 5000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Exhaustive:
    """Every set (NAEE).

    limit  more sets than this in a layer are refused
    """

    limit: Annotated[int, Field(ge=1)] = 2_000_000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Greedy:
    """Backward elimination on the exact loss."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Random:
    """The best of some random sets.

    draws  how many
    """

    draws: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReceptiveField:
    """Block-wise KT-Reception Field: all combinations of the best sets of a few successive layers are tried.

    k     how many of a layer's best sets take part
    t     MoE layers in a block; k to the power of t is at most 1,000
    mode  `progressive`: a block starts from what the blocks before it, compressed, give; `layerwise`: from the original's hidden states
    """

    k: Annotated[int, Field(ge=1, le=8)] = 3
    t: Annotated[int, Field(ge=1, le=6)] = 3
    mode: Literal["progressive", "layerwise"] = "progressive"


SEARCHES: dict[str, type] = {"genetic": Genetic, "exhaustive": Exhaustive, "greedy": Greedy, "random": Random}


def by_name(value: Any) -> Any:
    """`none`, a search's name, or {name: {its fields}}."""
    if value is None or value == "none" or isinstance(value, tuple(SEARCHES.values())):
        return None if value == "none" else value
    name, fields = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
    if not isinstance(name, str) or name not in SEARCHES:
        raise ValueError(f"{value!r} is not a search; there are none, {', '.join(SEARCHES)}")
    if fields is not None and not isinstance(fields, dict):
        raise ValueError(f"the fields of {name} must be a mapping, not {fields!r}")
    return TypeAdapter(SEARCHES[name]).validate_python(fields or {})


Search = Genetic | Exhaustive | Greedy | Random
