"""Drop whole experts. MoE-I2 arXiv 2411.01016 (search), NAEE arXiv 2402.14800 (exhaustive), Expert Drop arXiv 2406.02500 (scores)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from trimoe.calibration.statistics import LayerStats
from trimoe.errors import UserError
from trimoe.methods import budget
from trimoe.methods.expert_drop import receptive_field, scores, stability
from trimoe.methods.expert_drop import search as find
from trimoe.methods.expert_drop.choice import Choice
from trimoe.methods.expert_drop.options import STRICT, Drop, Exhaustive, Greedy, Random, ReceptiveField, Search, by_name
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.methods.lab import Lab
from trimoe.methods.method import Measure, Method, Outlined, Paper, Topic, plain, share_of
from trimoe.model.decision import Decisions, LayerDecision
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.walk.sensitivity import streams


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertDrop(Method):
    """Remove experts.

    ratio           share of all routed experts that goes; or
    count           how many go in each layer, with `counts: uniform`
    score           which number says that an expert matters; used where there is no search, and for `counts: global`
    counts          how many each layer loses: `uniform`; `importance` (inversely to the mean leave-one-out loss); `optimal` (least
                    sum of measured sensitivity x squared layer loss, exact knapsack); `global` (the lowest scores anywhere)
    search          how the set is chosen inside a layer: `none` takes the lowest scores; `exhaustive`, `genetic`, `greedy` and `random`
                    minimise the exact subset loss
    receptive_field  choose among each layer's k best sets by the error after t layers
    normalize       of leave-one-out losses, where layers are compared: `none`, the Frobenius norm itself, as MoE-I2 has it; `relative`
                    divides it by the norm of the layer's output
    layer_limit     a layer loses at most so many times the average share, which keeps down the memory of the search; null: down to what
                    its router needs, as in the papers
    protect_super_experts   experts with extreme activations never go; the papers protect none
    cross_check     in a layer where greedy sets found on half of the search tokens do worse on the other half than the set of the lowest
                    `gate`, that set goes in the place of the searched one; the papers take what was searched
    """

    name: ClassVar[str] = "expert_drop"
    paper: ClassVar[str] = "arXiv 2411.01016"

    mildest: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    usual: ClassVar[tuple[float, str] | None] = 0.25, "KL rose from 0.0075 at 25 % to 0.086 at 50 %"

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    count: Annotated[int, Field(ge=0)] | None = None
    score: Literal["leave_one_out", "reap", "gate", "frequency", "output_norm", "coactivation", "weights", "random"] = "leave_one_out"
    counts: Literal["importance", "uniform", "optimal", "global"] = "importance"
    search: Annotated[Search | None, BeforeValidator(by_name)] = None
    receptive_field: ReceptiveField | None = None
    normalize: Literal["none", "relative"] = "none"
    layer_limit: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = 3.0
    protect_super_experts: bool = True
    cross_check: bool = True

    # ---- on paper

    @property
    def gathers(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        exact = self.search is not None or self.score == "leave_one_out" or self.counts in ("importance", "optimal")
        return frozenset({"search"} if exact else set())

    def reach(self, sites: Mapping[int, MoeBlock]) -> int:
        """Among how many of a token's best experts the Gram is wanted: k + the most that a layer may lose; 0 if none is."""
        if "search" not in self.needs:
            return 0
        share = self.share(sites)
        widest = (
            max(self.uniform(sites).values())
            if self.counts == "uniform"
            else max(site.num_experts - self.floor(site, share) for site in sites.values())
        )
        return max(site.rule.top_k for site in sites.values()) + max(1, widest)

    def total(self, sites: Mapping[int, MoeBlock]) -> int:
        """How many experts go in all: the nearest count to the ratio that every layer's router groups allow."""
        step = max(site.rule.groups for site in sites.values())
        return round(self.share(sites) * sum(site.num_experts for site in sites.values()) / step) * step

    def share(self, sites: Mapping[int, MoeBlock]) -> float:
        return share_of(self.ratio, self.count, "expert_drop", max(site.num_experts for site in sites.values()))

    def floor(self, site: MoeBlock, share: float) -> int:
        """The fewest experts a layer may keep: what its router needs, and `layer_limit` times the average share may go."""
        if self.layer_limit is None:
            return site.rule.min_experts
        groups = site.rule.groups
        return max(site.rule.min_experts, site.num_experts - math.ceil(self.layer_limit * share * site.num_experts / groups) * groups)

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        """Raises if no choice can satisfy the routers' floors."""
        if any(site.factored or decisions[index].in_ranks for index, site in sites.items()):
            raise UserError("expert_drop: the experts are factored already; drop experts before low_rank.")
        if self.receptive_field and self.search is None:
            raise UserError("expert_drop: receptive_field chooses among the sets a search finds; set search as well.")
        field = self.receptive_field
        if field and field.k**field.t > 1000:
            raise UserError(
                f"expert_drop: receptive_field k {field.k}, t {field.t} means {field.k**field.t:,} combinations; at most 1,000 are allowed."
            )
        if self.count is not None and self.counts != "uniform":
            raise UserError(
                f"expert_drop: count is how many go in every layer, so it wants counts: uniform, not {self.counts}; or give a ratio."
            )
        if self.count is not None:
            for index, site in sites.items():
                left = site.num_experts - self.count
                if left < site.rule.min_experts or self.count % site.rule.groups:
                    raise UserError(self._floor(index, site, f"count {self.count}"))
        self.uniform(sites)
        if isinstance(self.search, Exhaustive):
            for index, dropped in self.uniform(sites).items():
                self.space(sites[index], dropped, ()).check()
                self._refuse_too_many(index, self.space(sites[index], dropped, ()))

    def outline(self, paper: Paper) -> Outlined:
        counts, kept = self.uniform(paper.sites), {index: paper.decisions[index].keep for index in paper.sites}
        return Outlined(
            {index: LayerDecision(keep=kept[index][: len(kept[index]) - count]) for index, count in counts.items()},
            open=frozenset({"counts"} if self.counts != "uniform" else ()),
        )

    def measures(self, skeleton: Skeleton, sites: Iterable[MoeBlock]) -> dict[str, Measure]:
        made = {}
        if self.counts == "optimal":
            made["Sensitivity"] = Measure(streams([site.layer for site in sites], skeleton.dtype))
        if self.receptive_field is not None:
            made["Receptive field"] = Measure(receptive_field.streams(self.receptive_field), to_the_end=False)
        return made

    def uniform(self, sites: Mapping[int, MoeBlock]) -> dict[int, int]:
        """How many go in each layer if all lose alike; raises if the ratio cannot be had."""
        if self.count is not None:
            return dict.fromkeys(sites, self.count)
        total = self.total(sites)
        room = sum(site.num_experts - self.floor(site, self.share(sites)) for site in sites.values())
        if total > room:
            tightest = min(sites, key=lambda index: sites[index].num_experts - sites[index].rule.min_experts)
            raise UserError(
                self._floor(tightest, sites[tightest], f"{total} of {sum(s.num_experts for s in sites.values())} experts to drop")
            )
        sizes, floors, step = self._limits(sites)
        return dict(zip(sites, budget.uniform_counts(sizes, total, floors=floors, step=step), strict=True))

    def _limits(self, sites: Mapping[int, MoeBlock]) -> tuple[list[int], list[int], list[int]]:
        return (
            [site.num_experts for site in sites.values()],
            [self.floor(site, self.share(sites)) for site in sites.values()],
            [site.rule.groups for site in sites.values()],
        )

    @staticmethod
    def _floor(index: int, site: MoeBlock, given: str) -> str:
        groups = f" in {site.rule.groups} router groups, from which equal numbers must go" if site.rule.groups > 1 else ""
        return (
            f"expert_drop: {given} is not possible: layer {index} has {site.num_experts} experts{groups} and its router needs at "
            f"least {site.rule.min_experts} (top-{site.rule.top_k}), so at most {site.num_experts - site.rule.min_experts} can go."
        )

    # ---- for people

    def to_json(self) -> dict[str, Any]:
        search = None if self.search is None else {type(self.search).__name__.lower(): plain(self.search)}
        return super().to_json() | {"search": search}

    @property
    def reads_text(self) -> bool:
        return bool(self.needs) or self.protect_super_experts or self.score not in ("weights", "random")

    @property
    def text_hint(self) -> str | None:
        if not self.protect_super_experts or replace(self, protect_super_experts=False).reads_text:
            return None
        return "Text is read only to know which experts are never dropped; with protect_super_experts: false none is needed."

    @property
    def amount(self) -> float | None:
        return self.ratio

    @property
    def stock_settings(self) -> dict[str, str]:
        return {"counts": "uniform"} if self.counts != "uniform" else {}

    def cautions(self, sites: Mapping[int, MoeBlock]) -> dict[Topic, str]:
        if self.total(sites) != 0:
            return {}
        experts = sum(site.num_experts for site in sites.values())
        return {"amount": f"expert_drop drops nothing: {self.share(sites):.3g} of {experts:,} routed experts is rounded to none."}

    def foretell(self, sites: Mapping[int, MoeBlock], layers: Iterable[tuple[int, LayerStats]]) -> tuple[list[str], dict[int, Drop]]:
        """Whether kept sets are stable, and of equal shares the experts with the lowest leave-one-out scores."""
        dropped, rows, drops = self.uniform(sites), {}, {}
        for index, layer in layers:
            site, count = sites[index], dropped[index]
            halves = stability.halves(self, site, layer, count)
            rows[str(index)] = {
                "dropped": count, "tokens_per_expert": layer["count_E"],
                "stability": halves.jaccard(site.num_experts) if halves is not None else None,
            }  # fmt: skip
            found = self.lowest(self.space(site, count, ()), scores.leave_one_out(layer)) if count and layer.search else None
            drops[index] = () if found is None else found.drops[0]
        unstable = stability.warning(rows)
        return [] if unstable is None else [unstable], drops

    # ---- from measurements to decisions

    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        return Choice.of(self, lab).decided()

    def importance(self, stats: LayerStats, seed: int) -> torch.Tensor:
        """The score of each expert, [E] float64 (higher stays)."""
        if self.score == "random":
            return torch.rand(stats.num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + stats.layer))
        if self.score == "leave_one_out":
            return self._leave_one_out(stats)
        return scores.SCORES[self.score](stats)

    def layer_importance(self, stats: LayerStats) -> float:
        """Mean leave-one-out loss of the layer's experts."""
        return float(self._leave_one_out(stats).mean())

    def _leave_one_out(self, stats: LayerStats) -> torch.Tensor:
        return scores.leave_one_out(stats) if self.normalize == "relative" else scores.raw_leave_one_out(stats)

    def layer_counts(
        self,
        sites: Mapping[int, MoeBlock],
        stats: Mapping[int, LayerStats],
        seed: int,
        *,
        menus: Mapping[int, Mapping[int, float]] | None = None,
        sensitivity: Mapping[int, float] | None = None,
    ) -> dict[int, int]:
        """How many experts each layer loses. `menus` (layer -> n -> loss) and `sensitivity` serve `optimal` only."""
        total = self.total(sites)
        sizes, floors, step = self._limits(sites)
        if self.counts == "uniform":
            return self.uniform(sites)
        if self.counts == "importance":
            importance = [self.layer_importance(stats[index]) for index in sites]
            return dict(zip(sites, budget.importance_counts(importance, sizes, total, floors=floors, step=step), strict=True))
        if self.counts == "optimal":
            assert menus is not None and sensitivity is not None
            chosen = budget.optimal_counts([menus[i] for i in sites], total, sensitivity=[sensitivity[i] for i in sites])
            return dict(zip(sites, chosen, strict=True))
        return self._global_counts(sites, stats, total, seed)

    def _global_counts(self, sites: Mapping[int, MoeBlock], stats: Mapping[int, LayerStats], total: int, seed: int) -> dict[int, int]:
        """The lowest scores over all layers go first, each layer down to its router's floor; grouped routers lose one per group a time."""
        left = dict.fromkeys(sites, 0)
        ranked = []
        for index, site in sites.items():
            value_GE = self.importance(stats[index], seed).view(site.rule.groups, -1).sort(-1)[0]
            ranked += [(float(column.mean()), index) for column in value_GE.T]
        for _, index in sorted(ranked):
            site = sites[index]
            if total >= site.rule.groups and site.num_experts - left[index] - site.rule.groups >= self.floor(site, self.share(sites)):
                left[index] += site.rule.groups
                total -= site.rule.groups
        return left

    @staticmethod
    def space(site: MoeBlock, dropped: int, protected: Drop) -> find.Space:
        """All sets of `dropped` experts; the protected ones are among them only if so many must go that there is no other way."""
        space = find.Space(site.num_experts, dropped, site.rule.groups, protected)
        try:
            space.check()
        except ValueError:
            return replace(space, protected=())
        return space

    def _refuse_too_many(self, index: int, space: find.Space) -> None:
        assert isinstance(self.search, Exhaustive)
        if space.size() > self.search.limit:
            raise UserError(
                f"expert_drop: exhaustive search in layer {index} means {space.size():,} sets, more than its limit of "
                f"{self.search.limit:,}; use search: genetic, or raise the limit."
            )

    def drop_sets(self, site: MoeBlock, stats: LayerStats, dropped: int, protected: Drop, seed: int, device: str = "cpu") -> find.Found:
        """The best sets of `dropped` experts of one layer, best first (k of them where a receptive field will choose)."""
        space = self.space(site, dropped, protected)
        keep = self.receptive_field.k if self.receptive_field else 1
        if dropped == 0:
            return find.Found(drops=((),), losses=(0.0,), evaluations=0, history=())
        if self.search is None:
            return self.lowest(space, self.importance(stats, seed))
        loss, seed = SubsetLoss(stats, device=device), (seed * 1009 + site.layer) % (1 << 63)
        if isinstance(self.search, Exhaustive):
            self._refuse_too_many(site.layer, space)
            return find.exhaustive(loss, space, keep=keep)
        if isinstance(self.search, Greedy):
            return find.greedy(loss, space, keep=keep)
        if isinstance(self.search, Random):
            return find.random(loss, space, draws=max(self.search.draws, keep), seed=seed, keep=keep)
        start = find.greedy(loss, space, keep=keep)
        found = find.genetic(
            loss, space, population=self.search.population, generations=self.search.generations, seed=seed, keep=keep,
            max_evaluations=max(1, self.search.max_evaluations - start.evaluations), start=start.drops,
        )  # fmt: skip
        trace = tuple((evaluated + start.evaluations, value) for evaluated, value in found.trace)
        return replace(found, evaluations=found.evaluations + start.evaluations, trace=trace)

    @staticmethod
    def lowest(space: find.Space, value_E: torch.Tensor) -> find.Found:
        """The lowest scores, equally many in each router group."""
        value_E = value_E.clone()
        value_E[list(space.protected)] = torch.inf
        size = space.num_experts // space.groups
        order_GE = value_E.view(space.groups, size).argsort(dim=-1, stable=True)[:, : space.num_drop // space.groups]
        drop = sorted((order_GE + torch.arange(space.groups).unsqueeze(1) * size).flatten().tolist())
        return find.Found(drops=(tuple(drop),), losses=(float("nan"),), evaluations=0, history=())

    def without(self, decisions: Decisions, drops: Mapping[int, Drop]) -> Decisions:
        """The decisions after these experts (numbered among the survivors so far) have gone."""
        return {
            index: LayerDecision(keep=tuple(expert for place, expert in enumerate(decision.keep) if place not in set(drops.get(index, ()))))
            for index, decision in decisions.items()
            if decision.gone is None
        }
