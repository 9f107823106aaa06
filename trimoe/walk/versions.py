"""Several changed versions of one model walked together, their common prefixes once; and how far each ends from the original.

A version is a set of changes by decoder layer. Versions that have had the same changes so far share one stream of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from trimoe.model.decision import Decisions, kept_layers
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET, Reporter
from trimoe.team import ALONE, Team
from trimoe.walk.decided import prune_layer
from trimoe.walk.hidden_states import HiddenStates, samples_for, streams_budget
from trimoe.walk.walk import LayerWalk

Change = Callable[[nn.Module, MoeBlock | None], AbstractContextManager[None]]  # holds while the layer runs
Name = TypeVar("Name", bound=Hashable)


def skipped(layer: nn.Module, site: MoeBlock | None) -> AbstractContextManager[None]:
    """The whole layer is left out; the walk knows this change by its identity."""
    return nullcontext()


@contextmanager
def without_moe(layer: nn.Module, site: MoeBlock | None) -> Iterator[None]:
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
    hidden: MutableSequence[torch.Tensor]


def sample_bytes(skeleton: Skeleton, length: int) -> int:
    """Bytes of one sample's hidden states."""
    return skeleton.dtype.itemsize * next(iter(skeleton.sites.values())).hidden * length


def spread(domains: Sequence[str], count: int) -> list[int]:
    """The numbers of `count` samples, from every domain as many as from any other (a short one gives what it has), evenly spread over
    each. `domains[n]` is sample n's."""
    places = {domain: [n for n, own in enumerate(domains) if own == domain] for domain in dict.fromkeys(domains)}
    wanted = dict.fromkeys(places, 0)
    while sum(wanted.values()) < min(count, len(domains)):
        open_ = [domain for domain in places if wanted[domain] < len(places[domain])]
        wanted[min(open_, key=lambda domain: wanted[domain])] += 1
    return sorted(
        own[round(at)]
        for domain, own in places.items()
        for at in torch.linspace(0, len(own) - 1, wanted[domain], dtype=torch.float64).tolist()
    )


def probe_rows(skeleton: Skeleton, samples_NL: torch.Tensor, streams: int, domains: Sequence[str] = ()) -> list[int]:
    """The numbers of the samples on which so many versions are walked: of all domains, and so many that `streams` copies of their hidden
    states can be had (hidden_states.samples_for). `domains`: every sample's; none given are one."""
    domains = domains or [""] * len(samples_NL)
    return spread(domains, samples_for(streams, sample_bytes(skeleton, samples_NL.shape[1]), len(set(domains))))


def budget_of(skeleton: Skeleton, streams: int, device: torch.device) -> int:
    """How many bytes of hidden states each of so many streams may have in memory."""
    return streams_budget(skeleton.largest_layer, device) // (streams + 2)


def carried(hidden: Iterable[torch.Tensor], budget: int) -> HiddenStates:
    """The start of a stream."""
    made = HiddenStates(budget)
    made.extend(hidden)
    return made


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
    budget = budget_of(skeleton, len(versions), walk.device)
    streams = [_Stream(list(versions), carried(walk.hidden, budget))]
    left = kept_layers(skeleton, decisions) if walk.batches else []
    for index in reporter.track(left, label, len(left), tokens=walk.share):
        with walk.layer(index) as layer:
            site = prune_layer(skeleton, index, layer, decisions)
            streams = [grown for stream in streams for grown in _step(walk, index, layer, site, stream, versions, budget)]
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
    walk: LayerWalk, index: int, layer: nn.Module, site: MoeBlock | None, stream: _Stream, versions: Mapping[Name, Mapping[int, Change]], budget: int
) -> list[_Stream]:  # fmt: skip
    groups: dict[int, tuple[Change | None, list[Hashable]]] = {}
    for name in stream.names:
        change = versions[name].get(index)  # type: ignore[index]
        groups.setdefault(id(change), (change, []))[1].append(name)
    out: list[_Stream] = []
    for change, names in groups.values():
        last = len(out) == len(groups) - 1
        hidden: MutableSequence[torch.Tensor] = stream.hidden if last else HiddenStates(budget)
        with change(layer, site) if change is not None else nullcontext():
            for batch, before in enumerate(stream.hidden):
                after = before if change is skipped else walk.step(index, layer, before, batch)
                if last:
                    hidden[batch] = after
                else:
                    hidden.append(after)
        out.append(_Stream(names, hidden))
    return out
