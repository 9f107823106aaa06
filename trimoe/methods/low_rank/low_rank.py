"""Low-rank experts with non-uniform ranks. MoE-I2 arXiv 2411.01016 (ranks from importance), SVD-LLM arXiv 2403.07378 (whitening).

An expert is two matrices here: the first projection with gate and up stacked, W_in [O, H], and the last, W_out [H, I]. Factoring gate
and up together lets them share the input factor V; at equal parameters that is clearly better than one pair of factors each (LOG.md),
which MoE-I2 has and `factors: separate` gives.

Letters: S routed tokens of one expert, H hidden size, I expert width, O = 2I (gated) or I, m x n any of the matrices, r rank, P products
that make one matrix (2: gate and up apart).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from trimoe.calibration.statistics import LayerStats
from trimoe.errors import UserError
from trimoe.methods import budget
from trimoe.methods.expert_drop import scores
from trimoe.methods.fitting import LayerFit
from trimoe.methods.lab import Lab
from trimoe.methods.low_rank import knapsack
from trimoe.methods.low_rank.factors import Cut, Joined, apart, factor, refit, spectrum
from trimoe.methods.method import WIDEST, Measure, Method, Outlined, Paper, Topic
from trimoe.model.decision import Decisions, LayerDecision
from trimoe.model.expert import matrices, run_expert
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import DENSE, FactoredExperts, first_projection
from trimoe.walk.expert_inputs import DAMP, LayerInputs, damped
from trimoe.walk.sensitivity import shrunk, streams

MULTIPLE = 8  # ranks: grouped matrix products want strides in multiples of 16 bytes
POINTS = 32  # of a spectrum that are recorded


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LowRank(Method):
    """Replace each expert's matrices by products of two factors.

    ratio    share of the (remaining) routed-expert parameters that goes
    rank     `uniform`; `importance`: inside a layer, proportional to importance^alpha (the paper's); `optimal`: over all matrices of
             all layers at once, least loss by singular values, expert energy and measured layer sensitivity; a matrix may stay dense
    alpha    exponent of `importance`
    factors  `shared`: gate and up are one matrix and have one input factor; `separate`: gate, up and down are factored each by itself, gate
             and up to the same rank (the paper's)
    whiten   `input`: minimise the error on each expert's own inputs (and refit the last projection to the factored first one);
             `none`: plain truncated SVD of the weights
    form     `factored` stores the factors; `dense` multiplies them out again (loads anywhere, saves nothing)
    """

    name: ClassVar[str] = "low_rank"
    paper: ClassVar[str] = "arXiv 2411.01016"

    label: ClassVar[str | None] = "Factor"
    mildest: ClassVar[Mapping[str, Any]] = {"ratio": 0.01}
    usual: ClassVar[tuple[float, str] | None] = 0.4, "KL rose from 0.011 at 40 % to 0.065 at 60 %"
    writes_computed: ClassVar[bool] = True
    progressive: ClassVar[bool] = False  # the original's inputs were better on every model and ratio tried (LOG.md)

    ratio: Annotated[float, Field(gt=0, lt=1)]
    rank: Literal["importance", "uniform", "optimal"] = "importance"
    alpha: Annotated[float, Field(ge=0, le=2)] = 0.15
    factors: Literal["shared", "separate"] = "shared"
    whiten: Literal["input", "none"] = "input"
    form: Literal["factored", "dense"] = "factored"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"uniform": set(), "importance": {"search"}, "optimal": {"spectra", "sensitivity"}}[self.rank])

    @property
    def gathers(self) -> bool:
        return bool(self.needs)

    @property
    def calibrated(self) -> bool:
        """Whether factors are fitted to what the experts are given."""
        return self.whiten == "input"

    @property
    def records(self) -> bool:
        return True

    # ---- on paper

    def reach(self, sites: Mapping[int, MoeBlock]) -> int:
        """Among how many of a token's best experts the Gram is wanted, 0 if none is."""
        return max(site.rule.top_k for site in sites.values()) + 1 if "search" in self.needs else 0

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        if any(site.factored or decisions[index].in_ranks for index, site in sites.items()):
            raise UserError("low_rank: the experts are factored already; it can be applied once.")
        for index, site in sites.items():
            if self.average(site) < MULTIPLE:
                raise UserError(
                    f"low_rank: ratio {self.ratio} leaves rank {self.average(site):.1f} in layer {index} (experts of {site.hidden} x {site.width}); "
                    f"at least {MULTIPLE} is needed, so ratio can be at most {1 - MULTIPLE / self._full_average(site):.2f}."
                )

    def outline(self, paper: Paper) -> Outlined:
        """Stand-in ranks of the right total."""
        out, slack = {}, 0
        optimal = self.rank == "optimal"
        for index, site in paper.sites.items():
            ranks = tuple(budget.uniform_ranks(site.num_experts, self.average(site), multiple=MULTIPLE, cap=self.cap(site)))
            out[index] = self._decision(paper.decisions[index], site, ranks, ranks)
            if self.form == "factored" and ("counts" in paper.open or optimal):
                # every rank is a multiple of 8, and one such step in a layer is what rounding can move; `optimal` spends the whole budget
                slack += MULTIPLE * (site.first + (self.parts(site) + 1) * site.hidden + site.width) * WIDEST
                if optimal:
                    slack += abs(self.parameters(site, site.num_experts) - factor_share(out[index], site)) * WIDEST
        return Outlined(out, slack, frozenset({"ranks"} if optimal and self.form == "factored" else ()))

    def measures(self, skeleton: Skeleton, sites: Iterable[MoeBlock]) -> dict[str, Measure]:
        if "sensitivity" not in self.needs:
            return {}
        return {"Sensitivity": Measure(streams([site.layer for site in sites], skeleton.dtype))}

    def made_bytes(self, site: MoeBlock, decision: LayerDecision, itemsize: int) -> int:
        if not decision.factored:
            return super().made_bytes(site, decision, itemsize)
        return 2 * factor_share(decision, site) * itemsize

    def _decision(self, before: LayerDecision, site: MoeBlock, inside: Sequence[int], outside: Sequence[int]) -> LayerDecision:
        return LayerDecision(
            keep=before.keep, in_ranks=tuple(inside), out_ranks=tuple(outside), separate=self.parts(site) > 1,
            merged=self.form == "dense",
        )  # fmt: skip

    # ---- for people

    @property
    def reads_text(self) -> bool:
        return self.calibrated or bool(self.needs)

    @property
    def amount(self) -> float | None:
        return self.ratio

    @property
    def stock_settings(self) -> dict[str, str]:
        return {"form": "dense"} if self.form == "factored" else {}

    def cautions(self, sites: Mapping[int, MoeBlock]) -> dict[Topic, str]:
        if self.form == "factored":
            return {}
        return {
            "stored": "low_rank with form: dense stores the products as large as before: the file gets no smaller and nothing gets faster."
        }

    # ---- sizes

    def parts(self, site: MoeBlock) -> int:
        """Of how many products an expert's first projection is made: 2 where gate and up are factored apart."""
        return site.first // site.width if self.factors == "separate" else 1

    def average(self, site: MoeBlock) -> float:
        """The rank R at which all factored matrices of an expert together hold (1 - ratio) of its weights."""
        return (1 - self.ratio) * self._full_average(site)

    def _full_average(self, site: MoeBlock) -> float:
        """The rank at which factoring all matrices saves nothing."""
        weights = site.first * site.hidden + site.hidden * site.width
        return weights / (site.first + self.parts(site) * site.hidden + site.hidden + site.width)

    def cap(self, site: MoeBlock) -> int:
        """The largest rank at which factors of any matrix still save."""
        one = site.first // self.parts(site)
        saving = min(one * site.hidden / (one + site.hidden), site.hidden * site.width / (site.hidden + site.width))
        largest = min(saving, site.hidden, site.width, one)
        return max(MULTIPLE, int(largest) // MULTIPLE * MULTIPLE)

    def parameters(self, site: MoeBlock, count: int) -> int:
        """Weights that `count` experts of this layer may keep."""
        return int((1 - self.ratio) * count * (site.first * site.hidden + site.hidden * site.width))

    # ---- statistics in, decisions out

    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        """Importance is measured again, on the model as the earlier steps leave it."""
        if not self.needs:
            return self.ranked(lab.sites, lab.decisions, {}), {}
        stats = lab.statistics(self.needs, self.reach(lab.sites), self.spectra if "spectra" in self.needs else None)
        sensitive: dict[int, float] | None = None
        probed: dict[str, Any] = {}
        if "sensitivity" in self.needs:
            sensitive, probed = lab.sensitivity(dict.fromkeys(lab.sites, shrunk), {})
        decided = self.ranked(lab.sites, lab.decisions, stats.layers, sensitivity=sensitive)
        routed = {index: layer.routed for index, layer in stats.layers.items() if layer.search}
        metrics: dict[str, Any] = {
            "tokens_per_expert": {str(i): layer["count_E"].tolist() for i, layer in stats.layers.items()},
            "sensitivity": None if sensitive is None else {str(i): value for i, value in sensitive.items()},
            "measured_on": probed | lab.text_seen(stats, routed),
        }
        if "spectra" in self.needs:
            metrics["spectra"] = {str(i): recorded_spectra(layer) for i, layer in stats.layers.items()}
        else:
            metrics["score"] = {str(i): scores.leave_one_out(layer).tolist() for i, layer in stats.layers.items()}
        return decided, metrics

    def ranked(
        self,
        sites: Mapping[int, MoeBlock],
        decisions: Decisions,
        stats: Mapping[int, LayerStats],
        *,
        sensitivity: Mapping[int, float] | None = None,
    ) -> Decisions:
        """Ranks for every surviving expert. `sites` describe the model as it is after earlier steps."""
        if self.rank == "optimal":
            assert sensitivity is not None
            ranks = self._optimal(sites, stats, sensitivity)
        else:
            ranks = {}
            for index, site in sites.items():
                average, cap = self.average(site), self.cap(site)
                if self.rank == "uniform":
                    one = budget.uniform_ranks(site.num_experts, average, multiple=MULTIPLE, cap=cap)
                else:
                    value = scores.raw_leave_one_out(stats[index]).tolist()
                    one = budget.importance_ranks(value, average, alpha=self.alpha, multiple=MULTIPLE, cap=cap)
                ranks[index] = (one, one)
        return {
            index: self._decision(decisions[index], sites[index], inside, outside) if {*inside, *outside} != {DENSE} else decisions[index]
            for index, (inside, outside) in ranks.items()
        }

    def _optimal(
        self, sites: Mapping[int, MoeBlock], stats: Mapping[int, LayerStats], sensitivity: Mapping[int, float]
    ) -> dict[int, tuple[list[int], list[int]]]:
        """One menu per matrix: ranks in multiples of 8 (0 included) and dense, each with its weights and its loss.

        Loss of cutting matrix A of expert e in layer i to rank r: s_i (sum (g||y||)^2 / ||F_i||^2) tail_r(A) / ||A||^2.
        """
        menus, owners = [], []
        for index, site in sites.items():
            layer = stats[index]
            energy_E = layer["gate_norm_sq_E"] / layer["energy_EE"].sum() * sensitivity[index]
            for name, rows, columns, parts in (("in", site.first, site.hidden, self.parts(site)), ("out", site.hidden, site.width, 1)):
                for expert in range(site.num_experts):
                    spectrum = layer[f"{name}_spectrum_ER"][expert].clamp_min(0)
                    tail = torch.cat([spectrum, spectrum.new_zeros(1)]).flip(0).cumsum(0).flip(0) / spectrum.sum().clamp_min(1e-30)
                    each = rows + parts * columns  # weights of one rank of all parts
                    saving = (rows * columns - 1) // each  # a rank that costs as much as dense is no option
                    choices = list(range(0, min(saving, len(spectrum)) + 1, MULTIPLE))
                    costs = [rank * each for rank in choices] + [rows * columns]
                    losses = [float(tail[rank] * energy_E[expert]) for rank in choices] + [0.0]
                    menus.append((costs, losses))
                    owners.append((index, name, expert, [*choices, DENSE]))
        total = sum(self.parameters(site, site.num_experts) for site in sites.values())
        picked = knapsack.cheapest_losses(menus, total)
        ranks: dict[int, tuple[list[int], list[int]]] = {i: ([0] * site.num_experts, [0] * site.num_experts) for i, site in sites.items()}
        for (index, name, expert, options), choice in zip(owners, picked, strict=True):
            ranks[index][name == "out"][expert] = options[choice]
        return ranks

    def fit(self, layer: LayerFit) -> tuple[Any, dict[str, Any]]:
        """The layer's experts, factored; the same experts where the factors were multiplied out."""
        part, decision = layer.part, layer.decision
        if part is None or decision.in_ranks is None or decision.out_ranks is None:
            return None, {}
        new = None if part.empty else self.transform(part.experts, part.site, part.decision(decision), part.seen)
        if decision.merged:
            part.complete()
            return part.whole, {}
        if part.team.count == 1:
            return new, {}
        made = part.team.everyone({} if new is None else dict(new.named_parameters(recurse=False)))
        out = FactoredExperts(part.whole, list(decision.in_ranks), list(decision.out_ranks), decision.separate)
        for name, parameter in out.named_parameters(recurse=False):
            if not name.endswith("_bias"):  # biases are the experts' own
                parameter.copy_(torch.cat([own[name] for own in made if name in own]))
        return out, {}

    # ---- tensors in, tensors out

    @torch.no_grad()
    def transform(self, experts: Any, site: MoeBlock, decision: LayerDecision, seen: LayerInputs | None) -> nn.Module:
        """The factored (or multiplied-out) experts. `site` and `experts` are those after dropping; `seen` is what the layer's block saw."""
        assert decision.in_ranks is not None and decision.out_ranks is not None
        factored = FactoredExperts(experts, list(decision.in_ranks), list(decision.out_ranks), decision.separate)
        merged_in, merged_out = [], []

        def first(w_in: torch.Tensor, moment: torch.Tensor | None, rank: int) -> Cut | Joined:
            if factored.parts == 1 or rank == DENSE:
                return factor(w_in, moment, rank)
            return Joined(tuple(factor(w, moment, rank) for w in apart(experts, w_in)), experts.is_concatenated)

        for expert in range(site.num_experts):
            w_in, w_out = matrices(experts, expert)
            if self.whiten == "none":
                cut_in = first(w_in, None, decision.in_ranks[expert])
                cut_out = factor(w_out, None, decision.out_ranks[expert])
            else:
                assert seen is not None
                given = seen.of(expert)
                cut_in = first(w_in, damped(given.moment, DAMP), decision.in_ranks[expert])
                target, moment = refit(experts, expert, given, cut_in, w_out)
                cut_out = factor(target, moment, decision.out_ranks[expert])
            factored.set_expert(expert, cut_in, cut_out)
            if decision.merged:
                merged_in.append(cut_in.product)
                merged_out.append(cut_out.product)
        if not decision.merged:
            return factored
        flip = experts.is_transposed
        first_projection(experts).copy_(torch.stack([w.mT if flip else w for w in merged_in]))
        experts.down_proj.copy_(torch.stack([w.mT if flip else w for w in merged_out]))
        return experts

    @torch.no_grad()
    def spectra(self, experts: Any, site: MoeBlock, seen: LayerInputs, stats: LayerStats) -> None:
        """Adds in_spectrum_ER and out_spectrum_ER to `stats`: squared singular values of the whitened matrices, largest first; of gate and
        up apart, which have one rank, their sum."""
        inside, outside = [], []
        for expert in range(site.num_experts):
            w_in, w_out = matrices(experts, expert)
            in_moment = out_moment = None
            if self.whiten == "input":
                given = seen.of(expert)
                in_moment = damped(given.moment, DAMP)
                inner, pooled = (run_expert(experts, expert, x)[0] for x in (given.x_SH, given.pool_PH))
                out_moment = damped(given.blended(inner, inner, pooled, pooled), DAMP)
            split = apart(experts, w_in) if self.parts(site) > 1 else (w_in,)
            inside.append(torch.stack([spectrum(w, in_moment) for w in split]).sum(0))
            outside.append(spectrum(w_out, out_moment))
        stats.sums["in_spectrum_ER"], stats.sums["out_spectrum_ER"] = torch.stack(inside).cpu(), torch.stack(outside).cpu()


def recorded_spectra(layer: LayerStats) -> dict[str, Any]:
    """Singular values of a layer's experts as they were factored (whitened): at POINTS ranks the least, middle and largest over the
    experts, as shares of each matrix's largest."""
    made: dict[str, Any] = {}
    for name in ("in", "out"):
        value_ER = layer[f"{name}_spectrum_ER"].clamp_min(0).sqrt()
        share_ER = value_ER / value_ER[:, :1].clamp_min(1e-30)
        at = torch.linspace(0, share_ER.shape[1] - 1, min(POINTS, share_ER.shape[1])).round().long()
        low, middle, high = (share_ER[:, at].quantile(q, 0).tolist() for q in (0.0, 0.5, 1.0))
        made[name] = {"rank": (at + 1).tolist(), "low": low, "median": middle, "high": high}
    return made


def factor_share(decision: LayerDecision, site: MoeBlock) -> int:
    """Weights stored for a layer's factored experts."""
    assert decision.in_ranks is not None and decision.out_ranks is not None
    parts = site.first // site.width if decision.separate else 1
    return _share(decision.in_ranks, site.first, site.hidden, parts) + _share(decision.out_ranks, site.hidden, site.width, 1)


def _share(ranks: Sequence[int], rows: int, columns: int, parts: int) -> int:
    return sum(rows * columns if rank == DENSE else rank * (rows + parts * columns) for rank in ranks)
