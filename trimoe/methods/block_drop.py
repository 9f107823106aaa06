"""Drop whole decoder layers. Block Drop, arXiv 2406.02500, section 4.3; `rerank: kl` is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from trimoe import parts
from trimoe.methods.method import Decisions
from trimoe.skeleton import Site
from trimoe.stats import Stats


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BlockDrop:
    """Drop the decoder layers whose output is most like their input, cos(x_l, x_(l+1)).

    ratio, count, threshold   share of the decoder layers, how many, or all whose similarity is above it (one of the three)
    choose     `discrete`: wherever; `consecutive`: one run of layers
    rerank     `kl`: of the most similar, drop one after the other what costs the least KL at the model's output
    """

    name: ClassVar[str] = "block_drop"
    paper: ClassVar[str] = "arXiv 2406.02500"
    scope: ClassVar[Literal["layer", "model"]] = "model"

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(ge=-1, lt=1)] | None = None
    choose: Literal["discrete", "consecutive"] = "discrete"
    rerank: Literal["none", "kl"] = "none"
    blocks: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cosines"})

    def reach(self, sites: Mapping[int, Site]) -> int:
        return 0

    def shape(self, sites: Mapping[int, Site], decisions: Decisions) -> None:
        parts.check(self.name, self.ratio, self.count, self.threshold, consecutive=self.choose == "consecutive", rerank=self.rerank == "kl")

    def candidates(self, depth: parts.Depth) -> list[parts.Part]:
        return [("block", index) for index in depth.blocks]

    def total(self, depth: parts.Depth) -> int | None:
        """How many decoder layers go; None where the threshold says."""
        most = depth.most(self.candidates(depth), mixed=False)
        return parts.wanted(self.name, self.ratio, self.count, len(depth.layers), most, "decoder layers")

    def similarity(self, candidates: list[parts.Part], stats: Stats) -> dict[parts.Part, float]:
        return {part: parts.similarity(part, stats, "residual") for part in candidates}
