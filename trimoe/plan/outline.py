"""A recipe worked through on paper: stand-in decisions of the right sizes, and what is still open. No weight is read."""

from __future__ import annotations

import math
from dataclasses import replace

from trimoe.calibration.search_tokens import search_budget, search_tensors
from trimoe.errors import UserError
from trimoe.methods import BlockDrop, ExpertDrop, LayerDrop, LowRank, Quantize, Step, WeightPrune, budget
from trimoe.methods.depth import candidates as parts
from trimoe.methods.low_rank.low_rank import MULTIPLE, factor_share
from trimoe.model import sublayer
from trimoe.model.decision import Decisions, LayerDecision, decided_sites, unchanged
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.recipe.recipe import Recipe

WIDEST = 4  # bytes of a weight, at most, when bounding what is still open


class Outline:
    """A recipe's steps on paper: stand-in decisions of the right sizes, every user error that can be found without a weight, and what is
    still open. Where it is open which layers are dropped, those of the fewest bytes are (or the most, for `largest`)."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, *, largest: bool):
        self.skeleton, self.largest = skeleton, largest
        self.decisions: Decisions = unchanged(skeleton.sites)
        self.slack, self.open_counts, self.open_ranks, self.open_depth = 0, False, False, False
        self.open_layers = False  # which layers go; `open_depth`: and it matters for the bytes
        self.gone = {"block": (0, 0), "moe": (0, 0)}  # decoder layers and MoE sub-layers that go: at least, at most
        for number, step in enumerate(recipe.steps):
            sites = decided_sites(skeleton.sites, self.decisions)
            before = next((done.name for done in recipe.steps if isinstance(done, Quantize | WeightPrune)), step.name)
            if any(decision.changed for decision in self.decisions.values()):
                raise UserError(f"{before} is fitted to the finished model, so it comes last and once; here {step.name} follows it.")
            try:
                step.shape(sites, self.decisions)
                searched(step, sites, recipe, 0)
            except UserError as mistake:  # says the method; which of the steps it is, is known here
                said = str(mistake)
                raise UserError(f"steps.{number}.{said}" if said.startswith(f"{step.name}:") else said) from None
            if isinstance(step, ExpertDrop):
                counts = step.uniform(sites)
                self.open_counts = self.open_counts or step.counts != "uniform"
                new = {i: LayerDecision(keep=self.decisions[i].keep[: len(self.decisions[i].keep) - counts[i]]) for i in sites}
            elif isinstance(step, LowRank):
                new, more = _on_paper(step, sites, self.decisions, self.open_counts)
                self.slack += more
                self.open_ranks = self.open_ranks or (step.rank == "optimal" and step.form == "factored")
            elif isinstance(step, Quantize | WeightPrune):
                new = step.with_linears(skeleton, sites, self.decisions)
            else:
                new = self._without(step)
            self.decisions = {**self.decisions, **new}

    @property
    def open_bytes(self) -> bool:
        return self.open_counts or self.open_ranks or self.open_depth

    def _without(self, step: LayerDrop | BlockDrop) -> Decisions:
        """Which layers go is open; here those that weigh least or most, as the steps before leave them."""
        left = parts.left(self.skeleton, self.decisions, blocks=step.whole)
        if isinstance(step, LayerDrop):
            for index in left.moe:
                sublayer.dropped_entry(self.skeleton, index)  # raises where dropping is not the identity
        total, candidates = step.total(left), step.candidates(left)
        step.pick(dict.fromkeys(candidates, 0.0), left, total)  # raises where no consecutive run can be had
        self._count(step, left, total)
        before = Layout(self.skeleton, self.decisions)
        self.open_depth = self.open_depth or isinstance(step, LayerDrop) or total is None or not _alike(before, left)
        self.open_layers = True
        weight = {}
        for kind, index in candidates:
            weight[kind, index] = before.groups[index + 1].nbytes
            if kind == "moe":
                without = {**self.decisions, index: replace(self.decisions[index], gone="moe")}
                weight[kind, index] -= Layout(self.skeleton, without, only=index).groups[index + 1].nbytes
        order = sorted(candidates, key=lambda part: weight[part] / left.cost(part, (), mixed=step.mixed), reverse=self.largest)
        chosen: list[parts.Part] = []
        for part in order if total is not None or self.largest else ():
            chosen = left.add(chosen, part, total, mixed=step.mixed)
        if self.open_counts:  # a dropped layer may have kept more or fewer experts than the stand-in says
            for _, index in chosen:
                if index in left.moe:
                    site = self.skeleton.sites[index]
                    self.slack += site.num_experts * (site.first * site.hidden + site.hidden * site.width) * WIDEST
        return {index: replace(self.decisions.get(index, LayerDecision()), gone=kind) for kind, index in chosen}

    def _count(self, step: LayerDrop | BlockDrop, left: parts.Depth, total: int | None) -> None:
        """How many decoder layers and MoE sub-layers the step takes away, at least and at most."""
        least, most = (0, left.most(step.candidates(left), mixed=step.mixed)) if total is None else (total, total)
        without = len(left.layers) - len(left.moe)  # layers that have no MoE sub-layer to take with them
        if not isinstance(step, LayerDrop):
            block, moe = (least, most), (max(0, least - without), min(most, len(left.moe) - 1))
        elif step.mixed:  # sub-layers are counted, of which a decoder layer has two; the last one may find nothing that fits
            block = (0, most if left.emptied else most // 2)
            moe = (0 if left.emptied else max(0, (least - 1) // 2 - without), min(most, len(left.moe) - 1))
        else:
            block, moe = (0, 0), (least, most)
        for kind, (low, high) in (("block", block), ("moe", moe)):
            self.gone[kind] = (self.gone[kind][0] + low, self.gone[kind][1] + high)


def _alike(layout: Layout, left: parts.Depth) -> bool:
    """Whether the same bytes stay whichever of the decoder layers go: those that can are all alike, one after the other."""
    place = [left.layers.index(index) for index in left.blocks]
    forms = {
        tuple((_unnumbered(entry.key), entry.dtype, entry.shape, entry.stands_for) for entry in layout.groups[index + 1])
        for index in left.blocks
    }
    return len(forms) == 1 and place == list(range(place[0], place[0] + len(place)))


def _unnumbered(key: str) -> str:
    """Without the layer's number, the first in it (as Layout renumbers)."""
    words = key.split(".")
    at = next((place for place, word in enumerate(words) if word.isdigit()), len(words))
    return ".".join(words[:at] + words[at + 1 :])


def _on_paper(step: LowRank, sites: dict[int, MoeBlock], decisions: Decisions, open_counts: bool) -> tuple[Decisions, int]:
    """Stand-in ranks of the right total, and by how many bytes the real ones may differ."""
    out, slack = {}, 0
    for index, site in sites.items():
        ranks = tuple(budget.uniform_ranks(site.num_experts, step.average(site), multiple=MULTIPLE, cap=step.cap(site)))
        out[index] = LayerDecision(
            keep=decisions[index].keep, in_ranks=ranks, out_ranks=ranks, separate=step.parts(site) > 1, merged=step.form == "dense"
        )
        if step.form == "factored" and (open_counts or step.rank == "optimal"):
            # every rank is a multiple of 8, and one such step in a layer is what rounding can move; `optimal` spends the whole budget
            slack += MULTIPLE * (site.first + (step.parts(site) + 1) * site.hidden + site.width) * WIDEST
            if step.rank == "optimal":
                slack += abs(step.parameters(site, site.num_experts) - factor_share(out[index], site)) * WIDEST
    return out, slack


def searched(step: Step, sites: dict[int, MoeBlock], recipe: Recipe, tokens: int) -> int:
    """How many search tokens a step takes of so many; raises if too few of them would fit."""
    spec = recipe.calibration
    return min(tokens, search_budget(list(sites.values()), step.reach(sites), spec.search_tokens, spec.search_memory))


def search_bytes(step: Step, sites: dict[int, MoeBlock], recipe: Recipe, tokens: int) -> list[int]:
    """Bytes of every tensor that is kept of a step's search tokens, layer by layer."""
    count, reach = searched(step, sites, recipe, tokens), step.reach(sites)
    return [
        math.prod(shape) * dtype.itemsize
        for site in (sites.values() if reach else ()) for shape, dtype in search_tensors(site, reach, count).values()
    ]  # fmt: skip
