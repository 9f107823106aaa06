"""Drop whole decoder layers. Block Drop, arXiv 2406.02500, section 4.3; `rerank: kl` is ours."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from trimoe.calibration.statistics import Stats
from trimoe.methods.depth import candidates as parts
from trimoe.methods.depth.depth_drop import DepthDrop


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BlockDrop(DepthDrop):
    """Drop the decoder layers whose output is most like their input, cos(x_l, x_(l+1)).

    ratio      share of the decoder layers that go; or
    count      how many go; or
    threshold  all go that are more similar than this
    choose     `discrete`: wherever; `consecutive`: one run of layers
    rerank     `kl`: of the most similar, drop one after the other what costs the least KL at the model's output
    """

    name: ClassVar[str] = "block_drop"

    @property
    def whole(self) -> bool:
        return True

    def candidates(self, depth: parts.Depth) -> list[parts.Part]:
        return [("block", index) for index in depth.blocks]

    def total(self, depth: parts.Depth) -> int | None:
        """How many decoder layers go; None where the threshold says."""
        most = depth.most(self.candidates(depth), mixed=False)
        return parts.wanted(self.name, self.ratio, self.count, len(depth.layers), most, "decoder layers")

    def similarity(self, candidates: list[parts.Part], stats: Stats) -> dict[parts.Part, float]:
        return {part: parts.similarity(part, stats, "residual") for part in candidates}
