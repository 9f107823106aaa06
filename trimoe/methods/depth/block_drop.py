"""Drop whole decoder layers. Block Drop, arXiv 2406.02500, section 4.3; `rerank: kl` is ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from trimoe.calibration.statistics import Stats
from trimoe.methods.depth import candidates as parts
from trimoe.methods.depth.depth_drop import DepthDrop
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton


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
    usual: ClassVar[tuple[float, str] | None] = 0.125, "KL rose from 0.15 at an eighth to 0.35 at a quarter"
    sub_layers: ClassVar[bool] = False

    @property
    def whole(self) -> bool:
        return True

    def candidates(self, depth: parts.Depth) -> list[parts.Part]:
        return [("block", index) for index in depth.blocks]

    def total(self, depth: parts.Depth) -> int | None:
        """How many decoder layers go; None where the threshold says."""
        most = depth.most(self.candidates(depth), mixed=False)
        return parts.wanted(self.name, self.ratio, self.count, len(depth.layers), most, "decoder layers")

    def bounds(self, left: parts.Depth, least: int, most: int) -> dict[str, tuple[int, int]]:
        without = len(left.layers) - len(left.moe)  # layers that have no MoE sub-layer to take with them
        return {"block": (least, most), "moe": (max(0, least - without), min(most, len(left.moe) - 1))}

    def counted(self, skeleton: Skeleton, sites: Sequence[MoeBlock]) -> int:
        return len(skeleton.layers)

    def similarity(self, candidates: list[parts.Part], stats: Stats) -> dict[parts.Part, float]:
        return {part: parts.similarity(part, stats, "residual") for part in candidates}
