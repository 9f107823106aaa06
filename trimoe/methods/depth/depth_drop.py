"""What layer_drop and block_drop share: how many parts of the depth go, and how they are chosen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from trimoe.calibration.statistics import Stats
from trimoe.methods.depth import candidates
from trimoe.methods.depth.candidates import Depth, Part
from trimoe.methods.lab import Lab
from trimoe.methods.method import WIDEST, Measure, Method, Outlined, Paper
from trimoe.model.decision import Decisions, LayerDecision
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.walk.versions import skipped, without_moe


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DepthDrop(Method):
    """The parts whose output is most like their input go; the class that extends this says which parts there are."""

    paper: ClassVar[str] = "arXiv 2406.02500"
    mildest: ClassVar[Mapping[str, Any]] = {"threshold": 0.99}
    sub_layers: ClassVar[bool]  # whether MoE sub-layers are candidates

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[float, Field(ge=-1, lt=1)] | None = None
    choose: Literal["discrete", "consecutive"] = "discrete"
    rerank: Literal["none", "kl"] = "none"

    # ---- on paper

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cosines"})

    @property
    def gathers(self) -> bool:
        return True

    @property
    def mixed(self) -> bool:
        """Whether sub-layers and whole layers are candidates together; then sub-layers are counted."""
        return False

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether whole decoder layers are candidates."""

    @abstractmethod
    def candidates(self, depth: Depth) -> list[Part]:
        """The parts that can go, of what is left."""

    @abstractmethod
    def total(self, depth: Depth) -> int | None:
        """How many go; None where the threshold says."""

    @abstractmethod
    def similarity(self, candidates: list[Part], stats: Stats) -> dict[Part, float]:
        """Each candidate's cosine between what comes in and what goes out."""

    @abstractmethod
    def bounds(self, left: Depth, least: int, most: int) -> dict[str, tuple[int, int]]:
        """How many decoder layers and MoE sub-layers go, at least and at most, if `least` to `most` of the candidates do."""

    @abstractmethod
    def counted(self, skeleton: Skeleton, sites: Sequence[MoeBlock]) -> int:
        """Of how many parts `ratio` is the share, before any step."""

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        candidates.check(
            self.name, self.ratio, self.count, self.threshold, consecutive=self.choose == "consecutive", rerank=self.rerank == "kl"
        )

    def outline(self, paper: Paper) -> Outlined:
        """Which layers go is open; here those that weigh least or most, as the steps before leave them."""
        left = candidates.left(paper.skeleton, paper.decisions, blocks=self.whole)
        self.refuse(paper.skeleton, left)
        total, parts = self.total(left), self.candidates(left)
        self.pick(dict.fromkeys(parts, 0.0), left, total)  # raises where no consecutive run can be had
        weight = {}
        for kind, index in parts:
            weight[kind, index] = paper.layer_bytes(index)
            if kind == "moe":
                weight[kind, index] -= paper.layer_bytes(index, replace(paper.decisions[index], gone="moe"))
        order = sorted(parts, key=lambda part: weight[part] / left.cost(part, (), mixed=self.mixed), reverse=paper.largest)
        chosen: list[Part] = []
        for part in order if total is not None or paper.largest else ():
            chosen = left.add(chosen, part, total, mixed=self.mixed)
        slack = 0
        if "counts" in paper.open:  # a dropped layer may have kept more or fewer experts than the stand-in says
            sites = [paper.skeleton.sites[index] for _, index in chosen if index in left.moe]
            slack = sum(site.num_experts * site.expert_parameters * WIDEST for site in sites)
        least, most = (0, left.most(parts, mixed=self.mixed)) if total is None else (total, total)
        alike = not self.sub_layers and total is not None and paper.alike(left.blocks, left.layers)
        gone = {index: replace(paper.decisions.get(index, LayerDecision()), gone=kind) for kind, index in chosen}
        return Outlined(gone, slack, frozenset({"layers"} if alike else {"layers", "depth"}), self.bounds(left, least, most))

    def refuse(self, skeleton: Skeleton, left: Depth) -> None:
        """Raises UserError where a candidate cannot go."""

    def measures(self, skeleton: Skeleton, sites: Iterable[MoeBlock]) -> dict[str, Measure]:
        if self.rerank == "none" or self.threshold is not None:
            return {}
        parts = self.count if self.count is not None else round((self.ratio or 0) * self.counted(skeleton, list(sites)))
        return {"Rerank": Measure(2 * parts + 3, rounds=parts)}

    @property
    def amount(self) -> float | None:
        return self.ratio

    def pick(self, similar: Mapping[Part, float], depth: Depth, total: int | None) -> list[Part]:
        """The most similar parts. Raises UserError where no consecutive run can be had."""
        threshold = 2.0 if self.threshold is None else self.threshold
        return candidates.pick(similar, depth, total, threshold=threshold, consecutive=self.choose == "consecutive", mixed=self.mixed)

    # ---- from measurements to decisions

    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        """The most similar parts; or of a shortlist twice as long, one after the other, what costs the least KL at the end."""
        stats = lab.statistics(self.needs, 0)
        left = candidates.left(lab.skeleton, lab.decisions, blocks=self.whole)
        similar, total = self.similarity(self.candidates(left), stats), self.total(left)
        chosen = self.pick(similar, left, total)
        if not chosen:
            most = max(similar.values())
            lab.reporter.say(f"{self.name}: nothing is above the threshold {self.threshold}; the most similar is {most:.4f}.")
        metrics: dict[str, Any] = {"similarity": {f"{kind} {index}": value for (kind, index), value in similar.items()}}
        metrics["measured_on"] = lab.text_seen(stats, {})
        if self.rerank == "kl" and total is not None:
            shortlist = candidates.ranked(similar, mixed=self.mixed)[: 2 * len(chosen) + 2]
            shortlist += [part for part in chosen if part not in shortlist]
            chosen, metrics["rerank"], metrics["measured_on"]["rerank"] = self._rerank(lab, shortlist, left, total)
        metrics["dropped"] = [f"{kind} {index}" for kind, index in chosen]
        return {index: replace(lab.decisions.get(index, LayerDecision()), gone=kind) for kind, index in chosen}, metrics

    def _rerank(self, lab: Lab, shortlist: list[Part], left: Depth, total: int) -> tuple[list[Part], list[dict[str, Any]], dict[str, Any]]:
        """Greedy: each time the part that, with those already chosen, costs the least KL (per sub-layer, in a mixture) against the
        model as earlier steps leave it. Returns the parts, what each round found, and on how much text."""
        few, count = lab.probe("Rerank", len(shortlist) + 1)
        chosen: list[Part] = []
        rounds: list[dict[str, Any]] = []
        before = 0.0
        while True:
            grown = {part: new for part in shortlist if (new := left.add(chosen, part, total, mixed=self.mixed)) != chosen}
            if not grown:
                return chosen, rounds, count
            changes = {part: {index: skipped if kind == "block" else without_moe for kind, index in new} for part, new in grown.items()}
            kl = lab.divergence(few, {**changes, None: {}}, f"Rerank, {len(chosen)} dropped")
            costs = {part: (kl[part] - before) / left.cost(part, chosen, mixed=self.mixed) for part in grown}
            best = min(costs, key=lambda part: (costs[part], -part[1]))
            rounds.append({"kl": {f"{kind} {index}": kl[kind, index] for kind, index in grown}, "dropped": f"{best[0]} {best[1]}"})
            chosen, before = grown[best], kl[best]
            shortlist = [part for part in shortlist if part != best]
