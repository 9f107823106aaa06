"""The statistics pass: one walk over the calibration text, everything any score or search asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimoe.methods.low_rank import Seen
from trimoe.methods.method import Decisions, decided_site
from trimoe.modeling_trimoe import first_projection
from trimoe.observe import Observer
from trimoe.progress import QUIET, Reporter
from trimoe.skeleton import Site, Skeleton, keep_experts
from trimoe.stats import LayerStats, Stats
from trimoe.stream import LayerWalk

ROUTING = frozenset({"channels", "cosines"})
Extra = Callable[[nn.Module, Site, Seen, LayerStats], None]


def prune_layer(layer: nn.Module, site: Site, decisions: Decisions | None) -> Site:
    """Apply an expert-drop decision to a loaded layer; returns the site as it is then."""
    decision = decisions.get(site.layer) if decisions else None
    if decision is None or len(decision.keep) == site.num_experts:
        return site
    keep_experts(site.block_of(layer), site, decision.keep)
    return decided_site(site, decision)


@contextmanager
def recorded_inputs(layer: nn.Module, site: Site) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """What the experts of `layer` are called with while it runs: (hidden [T, H], indices [T, k], weights [T, k]) per call."""
    calls: list[tuple[torch.Tensor, ...]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(tuple((*args, *kwargs.values())[:3]))

    handle = site.experts_of(layer).register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def search_rows(batches: Sequence[torch.Tensor], wanted: int, seed: int) -> list[torch.Tensor]:
    """A seeded subset of `wanted` token positions, as flattened rows of each batch."""
    sizes = [batch.numel() for batch in batches]
    chosen = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[:wanted].sort()[0]
    rows, start = [], 0
    for size in sizes:
        rows.append(chosen[(chosen >= start) & (chosen < start + size)] - start)
        start += size
    return rows


def search_budget(sites: Sequence[Site], reach: int, tokens: int, memory: float) -> int:
    """How many search tokens fit: each keeps a Gram of `reach` x `reach` float32 in every MoE layer, in `memory` GiB together."""
    each = sum(4 * min(reach, site.num_experts) ** 2 if site.rule.ordered else 4 * site.num_experts**2 for site in sites)
    return max(16, min(tokens, int(memory * 2**30 / each)))


@torch.no_grad()
def statistics(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    *,
    decisions: Decisions | None = None,
    reach: int = 0,
    search_tokens: int = 4096,
    search_memory: float = 2.0,
    seed: int = 0,
    device: str = "cpu",
    needs: frozenset[str] = ROUTING,
    extra: Extra | None = None,
    about: dict[str, Any] | None = None,
    reporter: Reporter = QUIET,
) -> Stats:
    """Statistics of every MoE layer, the model taken as `decisions` leave it.

    `reach` > 0 keeps the Gram among each search token's `reach` best experts (k + the most experts that may be dropped). `extra` is
    called with (experts module, site, what the experts were given, the layer's statistics) while the layer is in memory.
    """
    stats = Stats(about or {})
    walk = LayerWalk(skeleton, batches, device=device)
    wanted = search_budget(list(skeleton.sites.values()), reach, search_tokens, search_memory) if reach else 0
    rows = [r.to(walk.device) for r in search_rows(batches, wanted, seed)]
    for index in reporter.track(range(len(walk)), "Statistics", len(walk)):
        with walk.layer(index) as layer:
            if index not in skeleton.sites:
                walk.advance(index, layer)
                continue
            site = prune_layer(layer, skeleton.sites[index], decisions)
            layer_stats = stats.layers[index] = LayerStats(index, site.rule)
            experts = site.experts_of(layer)
            layer_stats.sums["weight_score_E"] = weight_scores(experts)
            observer = Observer(site, layer_stats, needs, reach=min(reach, site.num_experts))
            with observer.attached(layer), recorded_inputs(layer, site) as calls:
                for batch in range(len(walk.batches)):
                    observer.rows = rows[batch] if reach else None
                    walk.hidden[batch] = walk.step(index, layer, walk.hidden[batch], batch)
                    if extra is None:
                        calls.clear()
            if extra is not None:
                extra(experts, site, Seen(*(torch.cat(parts) for parts in zip(*calls, strict=True))), layer_stats)
            layer_stats.to_cpu()
    return stats


def weight_scores(experts: Any) -> torch.Tensor:
    """mean |w| / rms(w) over all weights of each expert, [E] float64."""
    mats = (first_projection(experts), experts.down_proj)
    rows = []
    for expert in zip(*mats, strict=True):
        flat = torch.cat([w.flatten().float() for w in expert])
        rows.append(flat.abs().mean(dtype=torch.float64) / flat.square().mean(dtype=torch.float64).sqrt().clamp_min(1e-30))
    return torch.stack(rows).cpu()
