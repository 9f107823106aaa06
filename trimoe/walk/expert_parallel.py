"""What expert parallelism would send: the all-to-all dispatch and combine of a cluster, counted from the routing that is really seen.

On W ranks (W-way expert parallelism), experts lie in contiguous blocks as equal as possible, the first E mod W one larger (vLLM's linear
placement; DeepSpeed's, which wants E divisible by W). Tokens live evenly on all ranks. A token's hidden state goes once to each *other*
rank that holds one of its experts, and one comes back from each. Letters: T tokens, k experts per token, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimoe.model.moe_block import MoeBlock

WAYS = (2, 4, 8)
ITEMSIZE = 2  # bytes of one element: activations are sent in bfloat16


def rank_of_expert(num_experts: int, ways: int) -> torch.Tensor:
    """The rank that holds each expert, int64 [E]."""
    size, larger = divmod(num_experts, ways)
    return torch.arange(ways).repeat_interleave(torch.tensor([size + (rank < larger) for rank in range(ways)]))


@dataclass
class LayerTraffic:
    """One MoE layer's sums, float64 on its device: tokens, how often each expert was chosen, and for every W <= E the number of distinct
    ranks among a token's experts."""

    hidden: int  # width of what an expert is given, and gives
    top_k: int
    rank_E: dict[int, torch.Tensor]
    tokens: torch.Tensor
    count_E: torch.Tensor
    distinct: dict[int, torch.Tensor]

    @classmethod
    def empty(cls, num_experts: int, hidden: int, top_k: int, device: torch.device) -> LayerTraffic:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        rank_E = {ways: rank_of_expert(num_experts, ways).to(device) for ways in WAYS if ways <= num_experts}
        return cls(hidden, top_k, rank_E, zeros(), zeros(num_experts), {ways: zeros() for ways in rank_E})

    def add(self, index_TK: torch.Tensor, counted_T: torch.Tensor) -> None:
        """Nothing here waits for the device."""
        counted_TK = counted_T.double().unsqueeze(1).expand_as(index_TK)
        self.tokens += counted_T.sum()
        self.count_E.index_add_(0, index_TK.flatten(), counted_TK.flatten())
        for ways, rank_E in self.rank_E.items():
            used_TW = torch.zeros(len(index_TK), ways, dtype=torch.float64, device=index_TK.device)
            self.distinct[ways] += used_TW.scatter_(1, rank_E[index_TK], counted_TK).sum()

    def report(self, ways: int) -> dict[str, float]:
        """Bytes per token and imbalance. A token's own rank is any with equal chance, so 1 / W of what it needs is at home."""
        there_and_back = 2 * (ways - 1) / ways * self.hidden * ITEMSIZE
        pairs_W = torch.zeros(ways, dtype=torch.float64).index_add_(0, self.rank_E[ways].cpu(), self.count_E.cpu())
        distinct = float(self.distinct[ways]) / float(self.tokens)
        return {
            "distinct_ranks": distinct, "bytes_per_token": there_and_back * distinct, "naive_bytes_per_token": there_and_back * self.top_k,
            "imbalance": float(pairs_W.max()) * ways / float(pairs_W.sum()),
        }  # fmt: skip


class Traffic:
    """Sums of every MoE layer of one model; those of parts of a text add up (merge). Layers without MoE send nothing and are absent."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerTraffic] = {}

    def add(self, layer: int, num_experts: int, hidden: int, index_TK: torch.Tensor, counted_T: torch.Tensor) -> None:
        """`index_TK` int64: the experts chosen; `counted_T`: which of the tokens count (padding does not), or for how many each
        stands."""
        if layer not in self.layers:
            self.layers[layer] = LayerTraffic.empty(num_experts, hidden, index_TK.shape[1], index_TK.device)
        self.layers[layer].add(index_TK, counted_T)

    def merge(self, other: Traffic) -> None:
        for index, theirs in other.layers.items():
            if index not in self.layers:
                self.layers[index] = LayerTraffic.empty(len(theirs.count_E), theirs.hidden, theirs.top_k, theirs.tokens.device)
            ours = self.layers[index]
            ours.tokens += theirs.tokens
            ours.count_E += theirs.count_E
            for ways, distinct in theirs.distinct.items():
                ours.distinct[ways] += distinct

    @contextmanager
    def watching(self, layer: nn.Module, site: MoeBlock | None, counted: Sequence[torch.Tensor]) -> Iterator[None]:
        """Count what the router of `layer` decides while it runs, once for each batch of `counted`, in their order."""
        if site is None:
            yield
            return
        batches = iter(counted)

        def see(module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            index_TK = output[2].reshape(-1, output[2].shape[-1]).long()
            self.add(site.layer, site.num_experts, site.hidden, index_TK, next(batches).flatten())

        handle = site.router_of(layer).register_forward_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def report(self, ways: int) -> dict[str, Any] | None:
        """Bytes summed over the layers, imbalance over them, and each layer. None where a layer has fewer experts than ranks."""
        if any(ways not in layer.rank_E for layer in self.layers.values()):
            return None
        layers = [{"layer": index, **self.layers[index].report(ways)} for index in sorted(self.layers)]
        imbalance = [row["imbalance"] for row in layers] or [1.0]  # a model with no MoE layer left is in balance
        return {
            "bytes_per_token": sum(row["bytes_per_token"] for row in layers),
            "naive_bytes_per_token": sum(row["naive_bytes_per_token"] for row in layers),
            "imbalance": {"mean": sum(imbalance) / len(imbalance), "worst": max(imbalance)}, "layers": layers,
        }  # fmt: skip
