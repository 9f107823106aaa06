"""How much a recipe has to compute, stage by stage, counted from shapes: FLOPs, cubed sides of factorisations, bytes, operations.

What the counts leave out is small beside them; numbers of elementwise passes were counted in the code of each stage. Letters: T tokens of
calibration, B of a batch, E experts (k chosen) of width I, O = 2I (gated) or I, H hidden size, S = T k / E tokens of one expert, N processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from trimoe import costs, measurements
from trimoe.calibration import batch_tokens, most_tokens
from trimoe.layout import Layout
from trimoe.methods import BlockDrop, ExpertDrop, LayerDrop, LowRank, Quantize, Step, WeightPrune
from trimoe.methods.expert_drop import Exhaustive, Genetic, Greedy, Random
from trimoe.methods.method import Decisions, decided_sites, unchanged
from trimoe.paper import Paper
from trimoe.quantization import ALPHAS, SHRINK
from trimoe.recipe import Recipe
from trimoe.recorded import DRAWS, FEW_SETS
from trimoe.seen import POOL_TOKENS
from trimoe.site import Site
from trimoe.skeleton import Skeleton
from trimoe.subset import gram_side, search_budget

PASSES = 48  # elementwise passes over a candidate's positions, beside its products (LOG.md)
BREEDING = 570  # small operations for each set that the genetic search finds and notes, beside its evaluation (LOG.md)
FEW = 0.6  # of the time of all eigenvectors, for a third of them at most (low_rank.leading)

Amount = tuple[str, float, float]  # kind (a field of machine.Rates), how much, rows of a matrix product


@dataclass
class Stage:
    """One stage's work: `shared` out over processes or `repeated` in each, and `network`: bytes that N processes send to each other, in
    all, as a function of N (docs/scale.md)."""

    name: str
    shared: list[Amount] = field(default_factory=list)
    repeated: list[Amount] = field(default_factory=list)
    sent: dict[str, float] = field(default_factory=dict)

    def network(self, processes: int) -> float:
        """`hops`: bytes that go from rank to rank and then to all; `all`: from their owners to all; `routed`: of all tokens' inputs, those that
        leave their process, the bytes of one token times T under ("routed", k)."""
        others = processes - 1
        total = (2 * self.sent.get("hops", 0.0) + self.sent.get("all", 0.0)) * others
        top_k = self.sent.get("top_k", 1.0)
        owners = processes * (1 - (1 - 1 / processes) ** top_k)
        return total + self.sent.get("routed", 0.0) * owners * others / processes

    def send(self, way: str, nbytes: float) -> None:
        self.sent[way] = self.sent.get(way, 0.0) + nbytes


class Work:
    """The stages of one recipe on one model, over `tokens` calibration tokens in batches of `batch`."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, *, device: str = "cpu"):
        self.skeleton, self.recipe, self.device = skeleton, recipe, torch.device(device).type
        spec = recipe.calibration
        self.length = min(spec.length, skeleton.context)
        self.tokens = most_tokens(spec.sources, spec.samples, self.length)
        self.batch = min(self.tokens, max(self.length, batch_tokens(device) // self.length * self.length))
        self.batches = math.ceil(self.tokens / self.batch)
        self.item = skeleton.dtype.itemsize
        self.caches = costs.caches(skeleton)
        self.original = Layout(skeleton, unchanged(skeleton.sites))

    def stages(self) -> Iterator[Stage]:
        decisions = unchanged(self.skeleton.sites)
        for number, step in enumerate(self.recipe.steps):
            yield from self._deciding(step, decisions)
            decisions = Paper(
                self.skeleton, Recipe(steps=self.recipe.steps[: number + 1], calibration=self.recipe.calibration), largest=False
            ).decisions
        yield self._last_walk(decisions)

    def sites(self, decisions: Decisions) -> list[Site]:
        return list(decided_sites(self.skeleton.sites, decisions).values())

    # ---- pieces

    def forward(self, index: int, decisions: Decisions, tokens: float) -> Iterator[Amount]:
        """So many tokens through one decoder layer, batch by batch."""
        site, batches = self.skeleton.sites.get(index), max(1.0, tokens / self.batch)
        hidden = next(iter(self.skeleton.sites.values())).hidden
        dense = costs.multiplied(self.skeleton, index, decisions.get(index))
        if site is not None and decisions[index].gone is None:
            decision, experts = decisions[index], len(decisions[index].keep)
            used = round(costs.expert_matrices(self.skeleton, site, decision) * costs.used_share(site, decision))
            dense -= used
            rows = min(tokens, self.batch) * site.rule.top_k / experts
            yield "matmul", 2 * tokens * used, rows
            yield "memory", 4 * tokens * site.rule.top_k * (6 * site.hidden + 4 * site.first), 0
            yield "ops", batches * 12 * experts, 0
        cache = None if self.caches is None else self.caches[index]
        attend = 0 if cache is None else cache.attend * self.length / 2 + cache.step
        yield "matmul", tokens * (2 * dense + attend), min(tokens, self.batch)
        yield "memory", 4 * tokens * 30 * hidden, 0
        yield "ops", batches * 120, 0

    def load(self, index: int) -> Iterator[Amount]:
        """One decoder layer from the disk into its compute dtype, its experts stacked."""
        entries = self.original.groups[index + 1]
        yield "read", sum(entry.nbytes for entry in entries), 0
        yield "memory", sum(entry.parameters for entry in entries) * 3 * (4 + self.item), 0
        yield "ops", 3000 + 150 * len(entries), 0

    def streams(self, runs: float, samples: float, ends: float) -> Iterator[Amount]:
        """`runs` layer runs on a few samples in one walk, and the model's head for `ends` versions."""
        tokens, count = samples * self.length, len(self.skeleton.layers)
        for index in range(count):
            yield from self.load(index)
            yield from (
                (kind, amount * runs / count, rows) for kind, amount, rows in self.forward(index, unchanged(self.skeleton.sites), tokens)
            )
        vocabulary = self.skeleton.config.get_text_config().vocab_size
        yield "matmul", 2 * ends * tokens * costs.head_matrix(self.skeleton), self.length
        yield "memory", 4 * ends * tokens * vocabulary * 8, 0

    # ---- stages

    def _deciding(self, step: Step, decisions: Decisions) -> Iterator[Stage]:
        if not step.gathers:
            return
        sites = self.sites(decisions)
        yield self._statistics(step, decisions, sites)
        if isinstance(step, ExpertDrop):
            yield from self._searching(step, sites)
        count = len(self.skeleton.layers)
        for made in measurements.of_step(self.skeleton, step, sites, self.recipe.calibration, self.tokens):
            if made.name == "Sensitivity":
                runs, ends = count * (made.streams + 3) / 2, made.streams + 1
            elif isinstance(step, ExpertDrop) and step.receptive_field is not None:
                k, t = step.receptive_field.k, step.receptive_field.t
                runs, ends = count * (1 + sum(k ** (j + 1) for j in range(t)) / t), 0
            else:
                assert isinstance(step, LayerDrop | BlockDrop)
                chosen = measurements.dropped_parts(self.skeleton, step, sites)
                tries = sum(2 * chosen + 2 - done for done in range(chosen))
                runs, ends = count * (tries / 2 + chosen), tries + chosen
            yield Stage(made.name, list(self.streams(runs, made.samples, ends)))

    def _statistics(self, step: Step, decisions: Decisions, sites: list[Site]) -> Stage:
        stage, spec = Stage("Statistics"), self.recipe.calibration
        alive, hidden = {site.layer: site for site in sites}, sites[0].hidden
        reach = step.reach({site.layer: site for site in sites})
        searched = min(self.tokens, search_budget(list(self.skeleton.sites.values()), reach, spec.search_tokens, spec.search_memory))
        for index in range(len(self.skeleton.layers)):
            stage.repeated += self.load(index)
            stage.shared += self.forward(index, decisions, self.tokens)
            stage.shared += [("memory", 4 * self.tokens * 6 * hidden, 0), ("ops", 12 * self.batches, 0)]
            stage.send("hops", 16 * self.batches)
            site = alive.get(index)
            if site is None:
                continue
            top_k, weights = site.rule.top_k, site.num_experts * (site.first * hidden + hidden * site.width)
            stage.shared += [
                ("memory", 4 * self.tokens * top_k * hidden * 7, 0), ("memory", 8 * self.tokens * top_k * top_k * 10, 0),
                ("ops", self.batches * (20 * site.num_experts + 60), 0),
            ]  # fmt: skip
            stage.repeated.append(("memory", 4 * weights * 3, 0))
            stage.send("hops", 8 * (2 * site.num_experts**2 + site.num_experts * hidden + 6 * site.num_experts))
            if reach:
                among = gram_side(site, reach)
                stage.shared += [
                    ("matmul", 2 * searched * among * weights / site.num_experts, min(searched, self.batch) * among / site.num_experts),
                    ("memory", 4 * searched * among * (4 * hidden + 4 * site.first), 0), ("matmul", 2 * searched * among**2 * hidden, 8),
                    ("ops", self.batches * 20 * site.num_experts, 0),
                ]  # fmt: skip
                stage.send("all", searched * (4 * among**2 + 8 * among + 4 * site.num_experts))
            if isinstance(step, LowRank) and "spectra" in step.needs:
                stage.shared += self._moments(site) if step.whiten == "input" else []
                stage.shared += self._spectra(site, step)
                self._routed(stage, site)
                stage.send("all", 8 * site.num_experts * (min(site.first, hidden) + min(hidden, site.width)))
        return stage

    def _searching(self, step: ExpertDrop, sites: list[Site]) -> Iterator[Stage]:
        """Every count of evaluations times what one costs: a re-routing and a small quadratic form a search token."""
        spec, reach = self.recipe.calibration, step.reach({site.layer: site for site in sites})
        if not reach:
            return
        searched = min(self.tokens, search_budget(list(self.skeleton.sites.values()), reach, spec.search_tokens, spec.search_memory))
        counts = step.uniform({site.layer: site for site in sites})
        search, menus, compare = Stage("Search"), Stage("Loss of every count"), Stage("Compare with greedy and random")
        for site in sites:
            dropped, count = counts[site.layer], site.num_experts
            greedy = dropped * count - dropped * (dropped - 1) // 2
            space = step.space(site, dropped, ()).size() if dropped else 1
            evaluations = {
                type(None): 0, Exhaustive: space, Greedy: greedy, Random: min(space, getattr(step.search, "draws", 0)),
                Genetic: min(space, getattr(step.search, "max_evaluations", 0)) + greedy,
            }[type(step.search)]  # fmt: skip
            search.shared += self._evaluated(site, searched, evaluations)
            if isinstance(step.search, Genetic):
                search.shared.append(("ops", BREEDING * evaluations, 0))
            if step.counts == "optimal":
                most = min(count - step.floor(site, step.share({site.layer: site})), reach - site.rule.top_k)
                menus.shared += self._evaluated(site, searched, most * count - most * (most - 1) // 2)
            if dropped:  # greedy, random draws, all of few sets, and greedy on both halves of the tokens
                every = space if space <= FEW_SETS and not isinstance(step.search, Exhaustive) else 0
                drawn = min(space, max(evaluations, 20), DRAWS)
                compare.shared += self._evaluated(site, searched, 2 * greedy + drawn + every + count)
        yield from (menus, search, compare) if menus.shared else (search, compare)

    def _evaluated(self, site: Site, searched: int, evaluations: float) -> Iterator[Amount]:
        first = (
            min(site.num_experts, -(-max(2 * site.rule.top_k, site.rule.top_k + 4) // 4) * 4) if site.rule.ordered else 2 * site.rule.top_k
        )
        yield "memory", evaluations * searched * first * 4 * PASSES, 0
        yield "matmul", evaluations * searched * (2 * first**2 + 2 * site.num_experts), 16
        yield "ops", 40 * evaluations * max(1.0, searched * first / (1 << 22)) + 400, 0

    def _last_walk(self, decisions: Decisions) -> Stage:
        """Fitted, and written."""
        factor = next((step for step in self.recipe.steps if isinstance(step, LowRank)), None)
        change = next((step for step in self.recipe.steps if isinstance(step, Quantize | WeightPrune)), None)
        stage = Stage(f"{change.label} and write" if change else "Factor and write" if factor else "Write")
        layout = Layout(self.skeleton, decisions)
        fitted = factor is not None or (change is not None and change.calibrated)
        for index in range(len(self.skeleton.layers)):
            entries, site = layout.groups[index + 1], self.skeleton.sites.get(index)
            stage.repeated += [("write", sum(entry.nbytes for entry in entries), 0), ("ops", 100 * len(entries), 0)]
            if not (fitted or change):
                stage.repeated.append(("read", sum(entry.nbytes for entry in entries), 0))
                continue
            stage.repeated += self.load(index)
            if fitted:
                walked = list(self.forward(index, unchanged(self.skeleton.sites), self.tokens))
                stage.shared += walked * (2 if change else 1)
            if site is None or decisions[index].gone is not None:
                continue
            left = next(one for one in self.sites(decisions) if one.layer == index)
            weights = left.num_experts * (left.first * left.hidden + left.hidden * left.width)
            if fitted:
                self._routed(stage, left)
            if factor is not None:
                stage.shared += self._factored(left, decisions[index].in_ranks or (), factor)
                stage.send(
                    "all", self.item * (weights if factor.form == "dense" else costs.expert_matrices(self.skeleton, site, decisions[index]))
                )
            if isinstance(change, Quantize):
                stage.shared += self._quantised(left, change)
                stage.send("all", weights * (1 + (self.item if not change.group else 2 / (decisions[index].group or 1))))
            elif change is not None:
                stage.shared += self._pruned(left, change)
                stage.send("all", self.item * weights)
        stage.repeated += [(kind, sum(entry.nbytes for entry in layout.groups[0]), 0) for kind in ("read", "write")]
        return stage

    def _routed(self, stage: Stage, site: Site) -> None:
        """Experts' inputs on their way to the experts' owners, and the layer's pool to all."""
        stage.send("routed", self.tokens * (site.hidden * self.item + 12 * site.rule.top_k))
        stage.sent["top_k"] = site.rule.top_k
        stage.send("all", self._pool * site.hidden * self.item)

    @property
    def _pool(self) -> int:
        return -(-self.tokens // max(1, self.tokens // POOL_TOKENS))

    def _moments(self, site: Site) -> Iterator[Amount]:
        """Both second moments of every expert, and what the last projection is given."""
        rows = self.tokens * site.rule.top_k / site.num_experts + self._pool
        expert = site.first * site.hidden
        yield "matmul", 2 * site.num_experts * rows * (site.hidden**2 + site.width**2 + expert + site.hidden * site.width), 2048
        yield "memory", site.num_experts * 8 * (4 * site.hidden**2 + 4 * site.width**2 + rows * (site.hidden + site.first)), 0
        yield "ops", 90 * site.num_experts, 0

    def _spectra(self, site: Site, step: LowRank) -> Iterator[Amount]:
        for m, n in _factored_shapes(site, step):
            yield "cholesky", site.num_experts * n**3, 0
            yield "double", site.num_experts * (2 * m * n**2 + 2 * min(m, n) ** 2 * max(m, n)), 0
            yield "eigvalsh", site.num_experts * min(m, n) ** 3, 0

    def _factored(self, site: Site, ranks: tuple[int, ...], step: LowRank) -> Iterator[Amount]:
        mean = sum(ranks) / max(1, len(ranks))
        for m, n in _factored_shapes(site, step):
            yield "cholesky", site.num_experts * n**3, 0
            yield "double", site.num_experts * (2 * m * n**2 + 2 * min(m, n) ** 2 * max(m, n) + 4 * mean * m * n), 0
            few = FEW if self.device == "cpu" and mean <= min(m, n) // 3 else 1.0
            yield "eigh", few * site.num_experts * min(m, n) ** 3, 0
        if step.whiten == "input":
            yield from self._moments(site)
            yield from self._moments(site)  # of the refit: old and new activations
            yield "solve", site.num_experts * site.width**3, 0
            yield "double", 2 * site.num_experts * site.hidden * site.width**2, 0

    def _quantised(self, site: Site, step: Quantize) -> Iterator[Amount]:
        weights = site.num_experts * (site.first * site.hidden + site.hidden * site.width)
        if step.method == "round":
            yield "memory", 4 * weights * 14, 0
            return
        yield from self._moments(site)
        clips = len(SHRINK) * (1 if step.method == "gptq" else 2)
        yield "memory", 4 * weights * 24 * clips, 0
        yield "ops", site.num_experts * 60 * clips, 0
        if step.method == "gptq":
            yield from self._columns(site)
        else:
            last = site.num_experts * site.hidden * site.width
            yield "memory", 4 * last * 30 * len(ALPHAS), 0
            yield "matmul", 2 * last * site.width * len(ALPHAS), site.hidden

    def _columns(self, site: Site) -> Iterator[Amount]:
        """GPTQ's and SparseGPT's: the factor of the moment, then column by column in blocks of 128."""
        for outputs, inputs in ((site.first, site.hidden), (site.hidden, site.width)):
            yield "cholesky", site.num_experts * 2 * inputs**3, 0
            yield "memory", site.num_experts * 4 * outputs * inputs * (64 * 3 + 20), 0
            yield "matmul", site.num_experts * outputs * inputs**2, 128
            yield "ops", site.num_experts * inputs * 16, 0

    def _pruned(self, site: Site, step: WeightPrune) -> Iterator[Amount]:
        weights = site.num_experts * (site.first * site.hidden + site.hidden * site.width)
        rows = self.tokens * site.rule.top_k / site.num_experts
        yield "memory", 4 * weights * 60, 0
        yield "ops", 200 * site.num_experts, 0
        if step.score == "sparsegpt":
            yield from self._moments(site)
            yield from self._columns(site)
        elif step.calibrated:
            yield "matmul", 2 * site.num_experts * rows * site.first * site.hidden, 2048
            yield "memory", 8 * site.num_experts * rows * (site.hidden + site.width) * 6, 0


def _factored_shapes(site: Site, step: LowRank) -> list[tuple[int, int]]:
    """Rows and columns of the matrices of one expert that are factored."""
    parts = step.parts(site)
    return [*[(site.first // parts, site.hidden)] * parts, (site.hidden, site.width)]
