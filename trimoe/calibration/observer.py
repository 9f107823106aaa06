"""Our experts function and hooks: they feed statistics while a decoder layer runs, and re-route tokens as if experts were gone.

One function, driven by the layout flags that transformers' decorator sets, serves every dispatched architecture. Letters as in statistics.py;
S = T k routed (token, expert) pairs, or those of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimoe.calibration.search_tokens import Candidates
from trimoe.calibration.statistics import MAXIMA, LayerStats, similarity
from trimoe.model import transformers5
from trimoe.model.expert import by_expert, run_expert
from trimoe.model.moe_block import MoeBlock

NAME = "trimoe_observe"
CHUNK = 1 << 23  # elements of a temporary that may be held at once (32 MiB of float32)


def observed_experts(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Runs each expert on its routed tokens and shows everything to the observer attached to the module."""
    observer: Observer = self._trimoe_observer
    top_k = top_k_index.shape[-1]
    gate_TK = top_k_weights.float()
    y_SH = hidden_states.new_empty(top_k_index.numel(), hidden_states.shape[-1])
    for expert, pairs in by_expert(top_k_index, self.num_experts):
        x = hidden_states[pairs // top_k]
        h, y = run_expert(self, expert, x)
        y_SH[pairs] = y
        observer.see_expert(expert, x, h, y, gate_TK.view(-1)[pairs])
    y_TKH = y_SH.view(-1, top_k, y_SH.shape[-1])
    observer.see_outputs(self, hidden_states, top_k_index, y_TKH, gate_TK)
    return torch.bmm(gate_TK.to(y_TKH.dtype).unsqueeze(1), y_TKH).squeeze(1)


transformers5.register_experts(NAME, observed_experts)


class Observer:
    """Collects one layer's statistics into `stats`.

    `needs`: "channels", "cosines" (routing and outputs always). `candidates` are shown all tokens: those that are taken of them have their
    Gram made afterwards (`see_search`).
    """

    def __init__(self, site: MoeBlock, stats: LayerStats, needs: frozenset[str], *, candidates: Candidates | None = None):
        self.site, self.stats, self.needs, self.candidates = site, stats, needs, candidates
        self.logits_TE: torch.Tensor | None = None

    @contextmanager
    def attached(self, layer: nn.Module) -> Iterator[None]:
        """Watch `layer` while it runs."""
        experts, router = self.site.experts_of(layer), self.site.router_of(layer)
        block = self.site.block_of(layer)
        self.stats.bias_E = self.site.bias_of(layer)
        handles = [router.register_forward_hook(self._see_router)]
        if "cosines" in self.needs:
            watcher = _Cosines(self.stats, layer, block)
            handles += watcher.handles
        experts._trimoe_observer = self
        try:
            with transformers5.experts_implementation(layer, NAME):
                yield
        finally:
            del experts._trimoe_observer
            for handle in handles:
                handle.remove()

    def _see_router(self, module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        self.logits_TE = output[0].float()

    def see_expert(self, expert: int, x_SH: torch.Tensor, h_SI: torch.Tensor, y_SH: torch.Tensor, gate_S: torch.Tensor) -> None:
        """One expert's routed tokens of one batch: its inputs, the inputs of its last projection, its outputs and their weights."""
        smallest, largest = torch.aminmax(y_SH)
        self._at("max_abs_E", expert, torch.maximum(largest, -smallest))
        self._at("mean_output_EH", expert, y_SH.sum(0, dtype=torch.float32))
        if "channels" in self.needs:
            weights_2S = torch.stack([torch.ones_like(gate_S), gate_S.square()])
            for name, width, value in (("x", "H", x_SH), ("h", "I", h_SI)):
                plain, weighted = weights_2S @ value.float().square()
                self._at(f"{name}_sq_E{width}", expert, plain)
                self._at(f"g{name}_sq_E{width}", expert, weighted)

    def _at(self, name: str, expert: int, value: torch.Tensor) -> None:
        """Add to one expert's row (or take the maximum, for maxima)."""
        if name not in self.stats.sums:
            self.stats.sums[name] = torch.zeros(self.site.num_experts, *value.shape, dtype=torch.float64, device=value.device)
        row = self.stats.sums[name][expert]
        if name in MAXIMA:
            row.copy_(torch.maximum(row, value.double()))
        else:
            row += value

    def see_outputs(
        self, module: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, y_TKH: torch.Tensor, gate_TK: torch.Tensor
    ) -> None:
        """All outputs of one batch, token by token: counts, norms, and the energy <g y, g' y'> that each pair of experts shares."""
        stats, count, device = self.stats, self.site.num_experts, y_TKH.device
        y_TKH = y_TKH.float()
        pair_TKK = torch.bmm(y_TKH, y_TKH.transpose(1, 2)).double()
        norm_TK = pair_TKK.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        gate_TK = gate_TK.double()
        stats.add("tokens", float(len(x_TH)))
        zeros_E = torch.zeros(count, dtype=torch.float64, device=device)
        for name, value_TK in (
            ("count_E", torch.ones_like(norm_TK)), ("gate_sum_E", gate_TK), ("norm_sum_E", norm_TK), ("gate_norm_sum_E", gate_TK * norm_TK),
            ("gate_norm_sq_E", (gate_TK * norm_TK) ** 2),
        ):  # fmt: skip
            stats.add(name, zeros_E.index_add(0, index_TK.flatten(), value_TK.flatten()))
        cell_S = (index_TK.unsqueeze(2) * count + index_TK.unsqueeze(1)).flatten()
        square = torch.zeros(count * count, dtype=torch.float64, device=device)
        energy_TKK = pair_TKK * gate_TK.unsqueeze(2) * gate_TK.unsqueeze(1)
        stats.add("energy_EE", square.index_add(0, cell_S, energy_TKK.flatten()).view(count, count))
        stats.add("coactivation_EE", torch.bincount(cell_S, minlength=count * count).view(count, count))
        if self.candidates is not None:
            assert self.logits_TE is not None
            self.candidates.see(x_TH, self.logits_TE.reshape(-1, self.logits_TE.shape[-1]), index_TK)

    def see_search(self, experts: nn.Module, x_TH: torch.Tensor, logits_TE: torch.Tensor, place: int) -> None:
        """Every expert that a search token can reach, run on it; only the Gram of the outputs is kept, in `stats.search` from `place` on."""
        rule, hidden, search = self.site.rule, x_TH.shape[-1], self.stats.search
        reach = search["order_TM"].shape[1]
        order_TM = reach_order(rule, logits_TE, self.stats.bias_E, reach)
        size = max(1, CHUNK * (1 if x_TH.device.type == "cpu" else 32) // (reach * hidden))
        for x, order, logits in zip(x_TH.split(size), order_TM.split(size), logits_TE.split(size), strict=True):
            y_SH = x.new_empty(order.numel(), hidden)
            for expert, pairs in by_expert(order, self.site.num_experts):
                y_SH[pairs] = run_expert(experts, expert, x[pairs // reach])[1]
            y_TMH = y_SH.view(-1, reach, hidden).float()
            gram_TMM = torch.bmm(y_TMH, y_TMH.transpose(1, 2))
            for name, part in (("logits_TE", logits), ("order_TM", order), ("gram_TMM", gram_TMM)):
                search[name][place : place + len(part)] = part
            place += len(order)


def reach_order(rule: Any, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, reach: int) -> torch.Tensor:
    """Each token's `reach` best experts, best first, by what the router chooses by; of groups equally many from each, one group after the other, or
    all experts by their numbers."""
    count = logits_TE.shape[-1]
    if rule.ordered:
        return rule.scores(logits_TE, bias_E).topk(min(reach, count), dim=-1)[1]
    if reach >= count or not rule.ordered_groups:
        return torch.arange(count, device=logits_TE.device).expand(len(logits_TE), count)
    by_group = rule.scores(logits_TE, bias_E).unflatten(-1, (rule.groups, -1))
    first = torch.arange(0, count, by_group.shape[-1], device=logits_TE.device).unsqueeze(1)
    return (by_group.topk(reach // rule.groups, dim=-1)[1] + first).flatten(1)


class _Cosines:
    """Sums of cosines between a MoE sub-layer's input and its output, with and without the residual, in float32."""

    def __init__(self, stats: LayerStats, layer: nn.Module, block: nn.Module):
        self.stats = stats
        self.before_norm = self.block_output = torch.empty(0)
        self.latest: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.handles = [child.register_forward_hook(self._child) for child in layer.children() if child is not block]
        self.handles += [block.register_forward_hook(self._block), layer.register_forward_hook(self._layer)]

    def _child(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, torch.Tensor) and isinstance(args[0], torch.Tensor) and output.shape == args[0].shape:
            self.latest.append((args[0], output))

    def _block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The residual stream before the sub-layer is the input of the norm whose output the block was given.
        source = [given for given, made in self.latest if made is args[0]]
        self.before_norm, self.block_output = (source or [args[0]])[-1], output[0] if isinstance(output, tuple) else output
        self.latest.clear()

    def _layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        before, block, out = (x.reshape(-1, x.shape[-1]).float() for x in (self.before_norm, self.block_output, out))
        self.stats.add("sublayer_cosine", similarity(before, out).double().sum())
        self.stats.add("output_cosine", similarity(before, block).double().sum())
