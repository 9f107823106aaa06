"""Several changed versions of one model walked together, their common prefixes once; and how far each ends from the original.

A version is a set of changes by decoder layer. Versions that have had the same changes so far share one stream of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from trimoe.calibration import in_batches
from trimoe.distributed import ALONE, Team
from trimoe.gather import prune_layer, survivors
from trimoe.methods.method import Decisions
from trimoe.progress import QUIET, Reporter
from trimoe.site import Site
from trimoe.skeleton import Skeleton
from trimoe.spill import samples_for
from trimoe.stream import LayerWalk

Change = Callable[[nn.Module, Site | None], AbstractContextManager[None]]  # holds while the layer runs
Name = TypeVar("Name", bound=Hashable)


def skipped(layer: nn.Module, site: Site | None) -> AbstractContextManager[None]:
    """The whole layer is left out; the walk knows this change by its identity."""
    return nullcontext()


@contextmanager
def without_moe(layer: nn.Module, site: Site | None) -> Iterator[None]:
    """The MoE sub-layer adds nothing to the residual stream."""
    assert site is not None

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handle = site.block_of(layer).register_forward_hook(nothing)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Stream:
    """Hidden states of all batches, and the versions that still share them."""

    names: list[Hashable]
    hidden: list[torch.Tensor]


def affordable(skeleton: Skeleton, batches: Sequence[torch.Tensor], streams: int, device: str = "cpu") -> list[torch.Tensor]:
    """Samples, evenly spread over the calibration set: so many that `streams` copies of their hidden states fit (spill.samples_for)."""
    samples = torch.cat(list(batches))
    hidden = next(iter(skeleton.sites.values())).hidden
    sample = skeleton.dtype.itemsize * hidden * samples.shape[1]
    count = min(len(samples), samples_for(streams, sample, skeleton.largest_layer))
    rows = torch.linspace(0, len(samples) - 1, count).round().long()
    return in_batches(samples[rows], device)


@torch.no_grad()
def divergence(
    skeleton: Skeleton,
    batches: Sequence[torch.Tensor],
    versions: Mapping[Name, Mapping[int, Change]],
    original: Name,
    *,
    decisions: Decisions | None = None,
    device: str = "cpu",
    label: str = "Versions",
    reporter: Reporter = QUIET,
    team: Team = ALONE,
) -> dict[Name, float]:
    """Mean KL(original || version) in nats per token at the model's output, for every version but `original` itself. Of a team each
    process carries its stretch of the batches.

    Changes stand on the model that `decisions` leave. Two versions share a layer's run if they had the very same (identical, not just
    equal) changes up to it.
    """
    walk = LayerWalk(skeleton, batches[team.span(len(batches))], device=device)
    streams = [_Stream(list(versions), list(walk.hidden))]
    left = survivors(skeleton, decisions) if walk.batches else []
    for index in reporter.track(left, label, len(left), tokens=walk.share):
        with walk.layer(index) as layer:
            site = prune_layer(skeleton, index, layer, decisions)
            streams = [grown for stream in streams for grown in _step(walk, index, layer, site, stream, versions)]
    pieces: list[dict[Hashable, float]] = []
    ends = {name: stream.hidden for stream in streams for name in stream.names}
    with walk.head() as head:
        for batch in range(len(walk.batches)):
            for positions in walk.pieces(batch):
                log_p = head(ends[original][batch], batch, positions).float().log_softmax(-1)
                pieces.append({})
                for stream in streams:
                    if stream.names == [original]:
                        continue
                    log_q = head(stream.hidden[batch], batch, positions).float().log_softmax(-1)
                    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
                    pieces[-1] |= dict.fromkeys(stream.names, kl)
    everyones = [piece for own in team.everyone(pieces) for piece in own]
    tokens = sum(batch.numel() for batch in batches)
    return {name: sum(piece.get(name, 0.0) for piece in everyones) / tokens for name in versions if name != original}


def _step(
    walk: LayerWalk, index: int, layer: nn.Module, site: Site | None, stream: _Stream, versions: Mapping[Name, Mapping[int, Change]]
) -> list[_Stream]:
    groups: dict[int, tuple[Change | None, list[Hashable]]] = {}
    for name in stream.names:
        change = versions[name].get(index)  # type: ignore[index]
        groups.setdefault(id(change), (change, []))[1].append(name)
    out: list[_Stream] = []
    for change, names in groups.values():
        last = len(out) == len(groups) - 1
        hidden = stream.hidden if last else list(stream.hidden)
        if change is not skipped:
            with change(layer, site) if change is not None else nullcontext():
                for batch in range(len(hidden)):
                    hidden[batch] = walk.step(index, layer, hidden[batch], batch)
        out.append(_Stream(names, hidden))
    return out
