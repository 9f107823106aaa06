"""Drop MoE sub-layers with their norms. Layer Drop, arXiv 2406.02500, section 4.2; `rerank: kl` and mixing in blocks are ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from trimoe.calibration.statistics import Stats
from trimoe.errors import UserError
from trimoe.methods.depth import candidates as parts
from trimoe.methods.depth.depth_drop import DepthDrop
from trimoe.model.decision import Decisions
from trimoe.model.depth_config import zero_block
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.model.sublayer import dropped_entry


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LayerDrop(DepthDrop):
    """Drop the MoE sub-layers that change the residual stream least: the token's state passes them by.

    ratio      share of the MoE layers that go; or
    count      how many go; or
    threshold  all go that are more similar than this
    metric     `residual`: cos(x, x + MoE(norm x)), the paper's; `output`: cos(x, MoE(norm x)), its ablation
    choose     `discrete`: wherever; `consecutive`: one run of MoE layers
    blocks     whole decoder layers are candidates as well; then ratio and count mean sub-layers, of which a decoder layer has two
    rerank     `kl`: of the most similar, drop one after the other what costs the least KL at the model's output
    """

    name: ClassVar[str] = "layer_drop"
    usual: ClassVar[tuple[float, str] | None] = 0.25, "KL rose from 0.16 at 25 % to 0.53 at 50 %"
    sub_layers: ClassVar[bool] = True

    metric: Literal["residual", "output"] = "residual"
    blocks: bool = False

    @property
    def mixed(self) -> bool:
        return self.blocks

    @property
    def whole(self) -> bool:
        return self.blocks

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        super().shape(sites, decisions)
        if any(site.factored for site in sites.values()):
            raise UserError("layer_drop: the model's experts are factored already; drop layers before low_rank, or use block_drop.")
        if self.blocks and self.choose == "consecutive":
            raise UserError("layer_drop: blocks cannot be mixed into one consecutive run; set choose: discrete, or use block_drop.")

    def candidates(self, depth: parts.Depth) -> list[parts.Part]:
        return [("moe", index) for index in depth.moe] + ([("block", index) for index in depth.blocks] if self.blocks else [])

    def total(self, depth: parts.Depth) -> int | None:
        """How many go, in MoE layers or (with `blocks`) sub-layers; None where the threshold says."""
        most = depth.most(self.candidates(depth), mixed=self.blocks)
        if self.blocks:
            return parts.wanted(self.name, self.ratio, self.count, 2 * len(depth.layers) - len(depth.emptied), most, "sub-layers")
        return parts.wanted(self.name, self.ratio, self.count, len(depth.moe), most, "MoE layers")

    def refuse(self, skeleton: Skeleton, left: parts.Depth) -> None:
        for index in left.moe:
            dropped_entry(skeleton, index)  # raises where dropping is not the identity

    def bounds(self, left: parts.Depth, least: int, most: int) -> dict[str, tuple[int, int]]:
        if not self.blocks:
            return {"block": (0, 0), "moe": (least, most)}
        # sub-layers are counted, of which a decoder layer has two; the last one may find nothing that fits
        without = len(left.layers) - len(left.moe)  # layers that have no MoE sub-layer to take with them
        fewest = 0 if left.emptied else max(0, (least - 1) // 2 - without)
        return {"block": (0, most if left.emptied else most // 2), "moe": (fewest, min(most, len(left.moe) - 1))}

    def counted(self, skeleton: Skeleton, sites: Sequence[MoeBlock]) -> int:
        return len(sites)

    def stock_method(self, skeleton: Skeleton) -> str | None:
        return "block_drop" if any(zero_block(skeleton, index) is None for index in skeleton.sites) else None

    def similarity(self, candidates: list[parts.Part], stats: Stats) -> dict[parts.Part, float]:
        return {part: parts.similarity(part, stats, self.metric) for part in candidates}
