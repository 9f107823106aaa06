"""What every compression method is: a frozen dataclass whose fields are its configuration, and what the stages of the job ask of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from trimoe.errors import UserError
from trimoe.model.decision import Decisions
from trimoe.model.linears import linears
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton

if TYPE_CHECKING:
    from trimoe.methods.lab import Lab


class Method:
    """One step of a recipe, whose fields are its configuration. Every method says what it does on paper and how it decides; what it
    does not say is as here. `sites` and `decisions` are of the model as earlier steps leave it."""

    name: ClassVar[str]
    paper: ClassVar[str]

    # ---- on paper

    @property
    def needs(self) -> frozenset[str]:
        """Statistics to gather beyond routing and outputs."""
        return frozenset()

    @property
    def gathers(self) -> bool:
        """Whether a pass over the calibration text comes before the decision."""
        return False

    def reach(self, sites: Mapping[int, MoeBlock]) -> int:
        """Among how many of a token's best experts the Gram is wanted; 0 if none is."""
        return 0

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        """Raises UserError for every mistake that can be found without a weight."""

    # ---- from measurements to decisions

    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        """What becomes of the layers that the step changes, and what is recorded of it."""
        raise NotImplementedError


class Fitted(Method):
    """What quantize and weight_prune share: matrices get other numbers in the last walk, and no statistics are gathered for it."""

    scope: str

    def forms(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> Decisions:
        """The form of every layer that has experts left."""
        raise NotImplementedError

    def takes(self, sites: Iterable[MoeBlock], module: nn.Linear) -> bool:
        """Whether a matrix outside the experts can have that form too."""
        raise NotImplementedError

    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        return self.with_linears(lab.skeleton, lab.sites, lab.decisions), {}

    def refuse_factored(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        for index, site in sites.items():
            if site.factored or decisions[index].factored:
                raise UserError(
                    f"{self.name}: the experts of layer {index} are factored; use low_rank with form: dense, or leave {self.name} out."
                )

    def with_linears(self, skeleton: Skeleton, sites: Mapping[int, MoeBlock], decisions: Decisions) -> Decisions:
        """The decisions, and the linears that `scope` has beside the experts: "moe" shared experts, "all-linear" all matrices of the
        decoder layers. Layers without experts take over the bits or zeros that the others have."""
        out = {**decisions, **self.forms(sites, decisions)}
        if self.scope == "experts":
            return out
        like = next(decision for decision in out.values() if decision.changed)
        plain = replace(like, keep=(), in_ranks=None, out_ranks=None, separate=False, merged=False)
        for index in range(len(skeleton.layers)):
            decision = out.get(index)
            if decision is not None and decision.gone == "block":
                continue
            gone = decision is not None and decision.gone is not None
            inside = f"{skeleton.sites[index].block}." if index in skeleton.sites else None
            paths = tuple(
                path
                for path, module in linears(skeleton, index, block=not gone).items()
                if self.takes(sites.values(), module) and (self.scope == "all-linear" or (inside is not None and path.startswith(inside)))
            )
            if paths:
                base = plain if decision is None else replace(plain, gone=decision.gone, keep=decision.keep) if gone else decision
                out[index] = replace(base, linears=paths)
        return out


def share_of(ratio: float | None, count: int | None, what: str, per_layer: int) -> float:
    """`ratio`, or `count` per layer as a ratio; exactly one of them is allowed."""
    if (ratio is None) == (count is None):
        raise UserError(f"{what}: give ratio or count{'' if ratio is None else ', not both'}.")
    return ratio if ratio is not None else count / per_layer  # type: ignore[operator]
