"""What was decided about each decoder layer: which experts stay, and in what form they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class LayerDecision:
    """What becomes of one decoder layer. `keep`: surviving experts by their number in the source. `in_ranks`, `out_ranks`: one rank per
    survivor for its first (gate and up stacked) and last projection; `separate` means that gate and up have a pair of factors each, both of
    the first's rank; `merged` means the factors are multiplied out again (dense).
    `gone`: "moe", the MoE sub-layer and its norm are dropped; "block", the whole layer is. `bits`, `group`: the experts' integers.
    `sparsity` or `pattern` (n of m stay): the experts' zeros; `bitmask`: zeros are left out on disk. `linears`: the layer's other matrices
    (module paths) that are quantised or pruned likewise; layers without experts are listed for these too."""

    keep: tuple[int, ...] = ()
    in_ranks: tuple[int, ...] | None = None
    out_ranks: tuple[int, ...] | None = None
    separate: bool = False
    merged: bool = False
    gone: Literal["moe", "block"] | None = None
    bits: int | None = None
    group: int | None = None
    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    bitmask: bool = False
    linears: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if value is not None and value is not False and (value != () or name == "keep")
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LayerDecision:
        fields: dict[str, Any] = {name: tuple(entry) if isinstance(entry, list) else entry for name, entry in value.items()}
        return cls(**fields)

    @property
    def pruned(self) -> bool:
        """Whether weights inside matrices become zero."""
        return self.sparsity is not None or self.pattern is not None

    @property
    def changed(self) -> bool:
        """Whether matrices get other numbers in the same shape: fitted in the last walk, so nothing may follow."""
        return self.bits is not None or self.pruned

    @property
    def factored(self) -> bool:
        return self.in_ranks is not None and not self.merged


Decisions = dict[int, LayerDecision]  # by decoder layer; layers without experts are listed only where something happens to them


def decided_sites(sites: Mapping[int, MoeBlock], decisions: Decisions) -> dict[int, MoeBlock]:
    """The MoE layers that are left, as they are then."""
    return {index: decided_site(site, decisions[index]) for index, site in sites.items() if decisions[index].gone is None}


def unchanged(sites: dict[int, MoeBlock]) -> Decisions:
    return {index: LayerDecision(keep=tuple(range(site.num_experts))) for index, site in sites.items()}


def decided_site(site: MoeBlock, decision: LayerDecision) -> MoeBlock:
    """The site after its experts have gone."""
    return replace(site, num_experts=len(decision.keep))


def kept_layers(skeleton: Skeleton, decisions: Decisions | None) -> list[int]:
    """Return the decoder layers that are not dropped whole, by their numbers in the source."""
    gone = {index for index, decision in (decisions or {}).items() if decision.gone == "block"}
    return [index for index in range(len(skeleton.layers)) if index not in gone]
