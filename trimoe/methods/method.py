"""What every compression method is: a frozen dataclass whose fields are its configuration, and a few pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as configured

from trimoe import parts
from trimoe.errors import UserError
from trimoe.site import Site


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


def decided_sites(sites: Mapping[int, Site], decisions: Decisions) -> dict[int, Site]:
    """The MoE layers that are left, as they are then."""
    return {index: decided_site(site, decisions[index]) for index, site in sites.items() if decisions[index].gone is None}


def unchanged(sites: dict[int, Site]) -> Decisions:
    return {index: LayerDecision(keep=tuple(range(site.num_experts))) for index, site in sites.items()}


def decided_site(site: Site, decision: LayerDecision) -> Site:
    """The site after its experts have gone."""
    return replace(site, num_experts=len(decision.keep))


class Method(Protocol):
    """One step of a recipe. `shape` works on paper: it raises every mistake a user can make and says how many experts or parameters go."""

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]: ...  # statistics to gather beyond routing and outputs

    @property
    def gathers(self) -> bool: ...  # whether a pass over the calibration text comes before the decision

    def shape(self, sites: dict[int, Site], decisions: Decisions) -> None: ...


class Fitted:
    """What quantize and weight_prune share: matrices get other numbers in the last walk, and no statistics are gathered for it."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gathers: ClassVar[bool] = False

    def reach(self, sites: Mapping[int, Site]) -> int:
        """Among how many of a token's best experts the Gram is wanted: none is."""
        return 0

    def refuse_factored(self, sites: Mapping[int, Site], decisions: Decisions) -> None:
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

    def reach(self, sites: Mapping[int, Site]) -> int:
        """Among how many of a token's best experts the Gram is wanted: none is."""
        return 0

    def shape(self, sites: Mapping[int, Site], decisions: Decisions) -> None:
        parts.check(self.name, self.ratio, self.count, self.threshold, consecutive=self.choose == "consecutive", rerank=self.rerank == "kl")

    def pick(self, similar: Mapping[parts.Part, float], depth: parts.Depth, total: int | None, *, mixed: bool) -> list[parts.Part]:
        """The most similar parts. Raises UserError where no consecutive run can be had."""
        threshold = 2.0 if self.threshold is None else self.threshold
        return parts.pick(similar, depth, total, threshold=threshold, consecutive=self.choose == "consecutive", mixed=mixed)


def share_of(ratio: float | None, count: int | None, what: str, per_layer: int) -> float:
    """`ratio`, or `count` per layer as a ratio; exactly one of them is allowed."""
    if (ratio is None) == (count is None):
        raise UserError(f"{what}: give ratio or count{'' if ratio is None else ', not both'}.")
    return ratio if ratio is not None else count / per_layer  # type: ignore[operator]
