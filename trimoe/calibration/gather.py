"""The statistics pass: one walk over the calibration text, everything any score or search asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from trimoe.calibration.observer import Observer
from trimoe.calibration.search_tokens import Candidates, choose, search_budget, search_tensors, search_wanted, shuffled
from trimoe.calibration.statistics import BLOCK, LayerStats, Stats, added
from trimoe.model.decision import Decisions, kept_layers
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import first_projection
from trimoe.progress import QUIET, Reporter
from trimoe.team import ALONE, Team
from trimoe.walk.decided import prune_layer
from trimoe.walk.expert_inputs import InputRecorder, LayerInputs
from trimoe.walk.expert_shards import share
from trimoe.walk.hidden_states import room
from trimoe.walk.walk import LayerWalk

ROUTING = frozenset({"channels", "cosines"})
Extra = Callable[[nn.Module, MoeBlock, LayerInputs, LayerStats], None]


@torch.no_grad()
def statistics(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    *,
    decisions: Decisions | None = None,
    reach: int = 0,
    search_tokens: int | None = None,
    search_memory: float = 2.0,
    seed: int = 0,
    device: str = "cpu",
    needs: frozenset[str] = ROUTING,
    extra: Extra | None = None,
    about: dict[str, Any] | None = None,
    reporter: Reporter = QUIET,
    team: Team = ALONE,
) -> Stats:
    """Statistics of every MoE layer, the model taken as `decisions` leave it; of a team each process walks its stretch of the batches, and
    all get the statistics of all.

    `reach` > 0 keeps the Gram among each search token's `reach` best experts (k + the most experts that may be dropped). `extra` is
    called with (experts module, site, what the experts were given, the layer's statistics) while the layer is in memory.
    """
    stats = Stats(about or {})
    mine = team.span(len(batches))
    walk = LayerWalk(skeleton, batches[mine], device=device)
    wanted = search_budget(list(skeleton.sites.values()), reach, search_tokens, search_memory)
    tokens, first, own = (sum(batch.numel() for batch in some) for some in (batches, batches[: mine.start], batches[mine]))
    if wanted < min(tokens, asked := search_wanted(list(skeleton.sites.values()), search_tokens)) and reach:
        reporter.say(
            f"Search tokens: {wanted:,} of the {min(tokens, asked):,} wanted, which is what search_memory {search_memory:g} GiB holds of a layer's."
        )
    wanted = min(wanted, tokens)
    rank_T = shuffled(tokens, seed)
    starts = [0, *accumulate(batch.numel() for batch in batches)]
    held = 0  # bytes of search tokens in memory
    left = kept_layers(skeleton, decisions)
    for index in reporter.track(left, "Statistics", len(left), tokens=walk.share):
        with walk.layer(index) as layer:
            site = prune_layer(skeleton, index, layer, decisions)
            parts = _Parts(stats, index, team)
            if site is None:
                for batch, hidden in enumerate(walk.hidden):
                    walk.hidden[batch] = walk.step(index, layer, hidden, batch)
                    stats.see_block(index, hidden, walk.hidden[batch])
                    parts.take()
                walk.check(index)
                parts.put_together()
                continue
            layer_stats = stats.layers[index] = LayerStats(index, site.rule)
            experts = site.experts_of(layer)
            candidates = Candidates(rank_T[first : first + own].to(walk.device), tokens, site.num_experts, wanted) if wanted else None
            observer = Observer(site, layer_stats, needs, candidates=candidates)
            recorder = InputRecorder(own)
            with observer.attached(layer), recorder.attached(layer, site) if extra is not None else nullcontext():
                for batch in range(len(walk.batches)):
                    hidden, walk.hidden[batch] = walk.hidden[batch], walk.step(index, layer, walk.hidden[batch], batch)
                    stats.see_block(index, hidden, walk.hidden[batch])
                    parts.take()
            walk.check(index)
            parts.put_together()
            if candidates is not None:
                layer_stats.search, held = _search_room(site, reach, wanted, held)
                _search(observer, experts, rank_T, starts, team)
            layer_stats.sums["weight_score_E"] = weight_scores(experts)
            if not batches:  # of weights alone
                layer_stats.sums["count_E"] = torch.zeros(site.num_experts, dtype=torch.float64)
            if extra is not None:
                part = share(team, experts, site, recorder.seen(), first, tokens)
                made = LayerStats(index, site.rule)
                if not part.empty:
                    extra(part.experts, part.site, part.seen, made)
                sums = [one for one in team.everyone(made.sums) if one]
                layer_stats.sums |= {name: torch.cat([one[name] for one in sums]) for name in sums[0]}
            layer_stats.to_cpu()
            layer_stats.check(skeleton.dtype)
    return stats


def _search_room(site: MoeBlock, reach: int, tokens: int, held: int) -> tuple[dict[str, torch.Tensor], int]:
    """Where one layer's search tokens go: in memory beside the `held` bytes of other layers', or in mapped files; and the bytes held then."""
    found = {}
    for name, (shape, dtype) in search_tensors(site, reach, tokens).items():
        found[name] = room(shape, dtype, torch.device("cpu"), held)
        held += found[name].nbytes
    return found, held


def _search(observer: Observer, experts: nn.Module, rank_T: torch.Tensor, starts: list[int], team: Team) -> None:
    """Choose one layer's search tokens, now that all of it are seen, and fill in what is kept of them. Each process sees to those of its own
    batches; `starts`: where every batch begins in the text, and the end."""
    candidates, search = observer.candidates, observer.stats.search
    assert candidates is not None
    index_TK = torch.cat(team.everyone(torch.cat(candidates.index).cpu() if candidates.index else torch.empty(0, observer.site.rule.top_k)))
    position_N, search["weight_T"][:] = choose(rank_T, index_TK, observer.site.num_experts, candidates.size)
    places = torch.searchsorted(position_N, torch.tensor(starts)).tolist()  # of each batch's first
    spans = [team.span(len(starts) - 1, rank) for rank in range(team.count)]
    mine = spans[team.rank]
    taken_T = torch.zeros(starts[mine.stop] - starts[mine.start], dtype=torch.bool)
    taken_T[position_N[places[mine.start] : places[mine.stop]] - starts[mine.start]] = True
    taken_T = taken_T.to(candidates.rank_T.device)
    for batch, place in enumerate(places[mine]):
        observer.see_search(experts, *candidates.of(batch, taken_T), place)
    for name in ("logits_TE", "order_TM", "gram_TMM"):
        team.fill(search[name], [slice(places[span.start], places[span.stop]) for span in spans])


class _Parts:
    """One layer's statistics batch by batch, where several processes have batches: added up in the order of one process."""

    def __init__(self, stats: Stats, index: int, team: Team):
        self.stats, self.index, self.team = stats, index, team
        self.parts: list[dict[str, torch.Tensor]] = []

    def take(self) -> None:
        """The batch that was just seen, put aside."""
        if self.team.count > 1:
            layer = self.stats.layers.get(self.index)
            self.parts.append({BLOCK: self.stats.blocks.pop(self.index).cpu(), **(layer.taken() if layer is not None else {})})

    def put_together(self) -> None:
        """All batches of all processes; there is nothing to add up where there is no text."""
        if not self.parts:
            return
        sums = self.team.fold(self.parts, added)
        self.stats.blocks[self.index] = sums.pop(BLOCK)
        layer = self.stats.layers.get(self.index)
        if layer is not None:
            layer.sums = sums


def weight_scores(experts: Any) -> torch.Tensor:
    """mean |w| / rms(w) over all weights of each expert, [E] float64. Rows are summed in float32, rows among each other in float64."""
    mats = (first_projection(experts), experts.down_proj)
    weights = sum(w[0].numel() for w in mats)
    absolute_E, square_E = (
        torch.stack([
            torch.linalg.vector_norm(w, ord=order, dim=-1, dtype=torch.float32).double().pow(order).sum(-1) for w in mats
        ]).sum(0)
        for order in (1, 2)
    )  # fmt: skip
    return ((absolute_E / weights) / (square_E / weights).sqrt().clamp_min(1e-30)).cpu()
