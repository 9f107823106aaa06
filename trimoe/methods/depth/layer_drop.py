"""Drop MoE sub-layers with their norms. Layer Drop, arXiv 2406.02500, section 4.2; `rerank: kl` and mixing in blocks are ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from trimoe.calibration.statistics import Stats
from trimoe.errors import UserError
from trimoe.methods.depth import candidates as parts
from trimoe.methods.depth.depth_drop import DepthDrop
from trimoe.model.decision import Decisions
from trimoe.model.moe_block import MoeBlock


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

    def similarity(self, candidates: list[parts.Part], stats: Stats) -> dict[parts.Part, float]:
        return {part: parts.similarity(part, stats, self.metric) for part in candidates}
