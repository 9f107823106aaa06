"""What every compression method is: a frozen dataclass whose fields are its configuration, and a few pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as configured

from trimoe.errors import UserError
from trimoe.methods.depth import candidates
from trimoe.model.decision import Decisions
from trimoe.model.moe_block import MoeBlock


class Method(Protocol):
    """One step of a recipe. `shape` works on paper: it raises every mistake a user can make and says how many experts or parameters go."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]: ...  # statistics to gather beyond routing and outputs

    @property
    def gathers(self) -> bool: ...  # whether a pass over the calibration text comes before the decision

    def shape(self, sites: dict[int, MoeBlock], decisions: Decisions) -> None: ...


class Fitted:
    """What quantize and weight_prune share: matrices get other numbers in the last walk, and no statistics are gathered for it."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gathers: ClassVar[bool] = False

    def reach(self, sites: Mapping[int, MoeBlock]) -> int:
        """Among how many of a token's best experts the Gram is wanted: none is."""
        return 0

    def refuse_factored(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        for index, site in sites.items():
            if site.factored or decisions[index].factored:
                raise UserError(
                    f"{self.name}: the experts of layer {index} are factored; use low_rank with form: dense, or leave {self.name} out."
                )


@configured(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DepthDrop:
    """What layer_drop and block_drop share: how many parts of the depth go, and how they are chosen."""

    name: ClassVar[str]
    paper: ClassVar[str] = "arXiv 2406.02500"
    needs: ClassVar[frozenset[str]] = frozenset({"cosines"})
    gathers: ClassVar[bool] = True

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(ge=-1, lt=1)] | None = None
    choose: Literal["discrete", "consecutive"] = "discrete"
    rerank: Literal["none", "kl"] = "none"

    def reach(self, sites: Mapping[int, MoeBlock]) -> int:
        """Among how many of a token's best experts the Gram is wanted: none is."""
        return 0

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        candidates.check(
            self.name, self.ratio, self.count, self.threshold, consecutive=self.choose == "consecutive", rerank=self.rerank == "kl"
        )

    def pick(
        self, similar: Mapping[candidates.Part, float], depth: candidates.Depth, total: int | None, *, mixed: bool
    ) -> list[candidates.Part]:
        """The most similar parts. Raises UserError where no consecutive run can be had."""
        threshold = 2.0 if self.threshold is None else self.threshold
        return candidates.pick(similar, depth, total, threshold=threshold, consecutive=self.choose == "consecutive", mixed=mixed)


def share_of(ratio: float | None, count: int | None, what: str, per_layer: int) -> float:
    """`ratio`, or `count` per layer as a ratio; exactly one of them is allowed."""
    if (ratio is None) == (count is None):
        raise UserError(f"{what}: give ratio or count{'' if ratio is None else ', not both'}.")
    return ratio if ratio is not None else count / per_layer  # type: ignore[operator]
