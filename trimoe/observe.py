"""Our experts function and hooks: they feed statistics while a decoder layer runs, and re-route tokens as if experts were gone.

One function, driven by the layout flags that transformers' decorator sets, serves every dispatched architecture. Letters as in stats.py;
S = T k routed (token, expert) pairs sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trimoe import hf
from trimoe.modeling_trimoe import first_projection
from trimoe.skeleton import Site
from trimoe.stats import LayerStats

NAME = "trimoe_observe"
CHUNK = 1 << 23  # elements of a temporary that may be held at once (32 MiB of float32)


def run_expert(module: Any, expert: int, x_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, y): the input of the last projection [S, I] and the output [S, H] of one expert, in any layout."""
    up, down = first_projection(module)[expert], module.down_proj[expert]
    first = x_SH @ up if module.is_transposed else F.linear(x_SH, up)
    if module.has_bias:
        first = first + getattr(module, "gate_up_proj_bias" if module.has_gate else "up_proj_bias")[expert]
    h_SI = module._apply_gate(first) if module.has_gate else module.act_fn(first)
    y_SH = h_SI @ down if module.is_transposed else F.linear(h_SI, down)
    if module.has_bias:
        y_SH = y_SH + module.down_proj_bias[expert]
    if getattr(module, "has_post_expert_norm", False):
        y_SH = module.post_expert_norm(y_SH)
    return h_SI, y_SH


def observed_experts(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """Runs each expert on its routed tokens and shows everything to the observer attached to the module."""
    observer: Observer = self._trimoe_observer
    num_tokens, top_k = top_k_index.shape
    order_S = top_k_index.reshape(-1).argsort(stable=True)
    ends = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).cumsum(0).tolist()
    x_SH = hidden_states[order_S // top_k]
    gate_S = top_k_weights.reshape(-1)[order_S].float()
    y_SH = torch.empty_like(x_SH)
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            h, y = run_expert(self, expert, x_SH[start:end])
            y_SH[start:end] = y
            observer.see_expert(expert, x_SH[start:end], h, gate_S[start:end])
        start = end
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    weighted_TKH = (y_SH * gate_S.to(y_SH.dtype).unsqueeze(-1))[back_S].view(num_tokens, top_k, -1)
    observer.see_outputs(self, hidden_states, top_k_index, y_SH, gate_S, ends, weighted_TKH)
    return weighted_TKH.sum(1).to(hidden_states.dtype)


hf.register_experts(NAME, observed_experts)


class Observer:
    """Collects one layer's statistics into `stats`.

    `needs`: "channels", "cosines" (routing and outputs always). `search_rows`: for each batch the rows (flattened
    token positions) whose full Gram is wanted, and `reach`: among how many of a token's best experts.
    """

    def __init__(self, site: Site, stats: LayerStats, needs: frozenset[str], *, reach: int = 0):
        self.site, self.stats, self.needs, self.reach = site, stats, needs, reach
        self.rows: torch.Tensor | None = None
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
            with hf.experts_implementation(layer, NAME):
                yield
        finally:
            del experts._trimoe_observer
            for handle in handles:
                handle.remove()

    def _see_router(self, module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        self.logits_TE = output[0].float()

    def see_expert(self, expert: int, x_SH: torch.Tensor, h_SI: torch.Tensor, gate_S: torch.Tensor) -> None:
        if "channels" not in self.needs:
            return
        weights_2S = torch.stack([torch.ones_like(gate_S), gate_S.square()])
        for name, width, value in (("x", "H", x_SH), ("h", "I", h_SI)):
            plain, weighted = weights_2S @ value.float().square()
            self._at(f"{name}_sq_E{width}", expert, plain)
            self._at(f"g{name}_sq_E{width}", expert, weighted)

    def _at(self, name: str, expert: int, value: torch.Tensor) -> None:
        """Add to one expert's row."""
        if name not in self.stats.sums:
            self.stats.sums[name] = torch.zeros(self.site.num_experts, *value.shape, dtype=torch.float64, device=value.device)
        self.stats.sums[name][expert] += value

    def see_outputs(
        self, module: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, y_SH: torch.Tensor, gate_S: torch.Tensor, ends: list[int],
        weighted_TKH: torch.Tensor,
    ) -> None:  # fmt: skip
        stats, count = self.stats, self.site.num_experts
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        stats.add("tokens", float(len(x_TH)))
        stats.add("count_E", torch.tensor(sizes))
        norm_S = torch.linalg.vector_norm(y_SH, dim=-1, dtype=torch.float32)
        largest_S = torch.maximum(y_SH.amax(-1), -y_SH.amin(-1)).float() if len(y_SH) else norm_S
        ids_S = torch.repeat_interleave(torch.arange(count, device=y_SH.device), torch.tensor(sizes, device=y_SH.device))
        zeros = torch.zeros(count, dtype=torch.float64, device=y_SH.device)
        for name, value in (
            ("gate_sum_E", gate_S), ("norm_sum_E", norm_S), ("gate_norm_sum_E", gate_S * norm_S), ("gate_norm_sq_E", (gate_S * norm_S) ** 2)
        ):  # fmt: skip
            stats.add(name, zeros.index_add(0, ids_S, value.double()).cpu())
        stats.add("max_abs_E", zeros.scatter_reduce(0, ids_S, largest_S.double(), "amax").cpu())
        rows = [part.sum(0) if len(part) else part.new_zeros(part.shape[1:]) for part in y_SH.float().split(sizes)]
        stats.add("mean_output_EH", torch.stack(rows).double().cpu())
        pair_TKK = torch.bmm(weighted_TKH, weighted_TKH.transpose(1, 2)).double()
        cell_TKK = index_TK.unsqueeze(2) * count + index_TK.unsqueeze(1)
        square = torch.zeros(count * count, dtype=torch.float64, device=y_SH.device)
        stats.add("energy_EE", square.index_add(0, cell_TKK.flatten(), pair_TKK.flatten()).view(count, count).cpu())
        stats.add("coactivation_EE", torch.bincount(cell_TKK.flatten(), minlength=count * count).view(count, count).cpu())
        if self.rows is not None and len(self.rows):
            assert self.logits_TE is not None
            self._see_search(module, x_TH[self.rows], self.logits_TE.reshape(-1, self.logits_TE.shape[-1])[self.rows])

    def _see_search(self, module: nn.Module, x_TH: torch.Tensor, logits_TE: torch.Tensor) -> None:
        """Every expert that a search token can reach, run on it; only the Gram of the outputs is kept."""
        rule, hidden = self.site.rule, x_TH.shape[-1]
        order_TM = reach_order(rule, logits_TE, self.stats.bias_E, self.reach)
        reach = order_TM.shape[1]
        grams = []
        for x, order in zip(x_TH.split(size := max(1, CHUNK // (reach * hidden))), order_TM.split(size), strict=True):
            y_TMH = x.new_empty(len(x), reach, hidden)
            for expert in range(self.site.num_experts):
                tokens, places = (order == expert).nonzero(as_tuple=True)
                if len(tokens):
                    y_TMH[tokens, places] = run_expert(module, expert, x[tokens])[1]
            y_TMH = y_TMH.float()
            grams.append(torch.bmm(y_TMH, y_TMH.transpose(1, 2)))
        self.stats.add_search(logits_TE=logits_TE.cpu(), order_TM=order_TM.cpu(), gram_TMM=torch.cat(grams).cpu())


def reach_order(rule: Any, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, reach: int) -> torch.Tensor:
    """Each token's `reach` best experts, best first, by what the router chooses by; all experts in order where the choice is grouped."""
    count = logits_TE.shape[-1]
    if not rule.ordered:
        return torch.arange(count, device=logits_TE.device).expand(len(logits_TE), count)
    return rule.scores(logits_TE, bias_E).topk(min(reach, count), dim=-1)[1]


class _Cosines:
    """Sums of cosines between a layer's (and its MoE sub-layer's) input and output, in float32."""

    def __init__(self, stats: LayerStats, layer: nn.Module, block: nn.Module):
        self.stats = stats
        self.before_norm = self.block_output = torch.empty(0)
        self.latest: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.handles = [child.register_forward_hook(self._child) for child in layer.children() if child is not block]
        self.handles += [block.register_forward_hook(self._block), layer.register_forward_hook(self._layer, with_kwargs=True)]

    def _child(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, torch.Tensor) and isinstance(args[0], torch.Tensor) and output.shape == args[0].shape:
            self.latest.append((args[0], output))

    def _block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # The residual stream before the sub-layer is the input of the norm whose output the block was given.
        source = [given for given, made in self.latest if made is args[0]]
        self.before_norm, self.block_output = (source or [args[0]])[-1], output[0] if isinstance(output, tuple) else output
        self.latest.clear()

    def _layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        given = args[0] if args else kwargs["hidden_states"]
        for name, a, b in (
            ("sublayer_cosine", self.before_norm, out), ("output_cosine", self.before_norm, self.block_output), ("block_cosine", given, out)
        ):  # fmt: skip
            self.stats.add(name, F.cosine_similarity(a.float(), b.float().reshape(a.shape), dim=-1).double().sum().cpu())


@contextmanager
def masked(layer: nn.Module, site: Site, drop: tuple[int, ...]) -> Iterator[None]:
    """Run `layer` as if the experts of `drop` did not exist: its router's decisions are replaced by the rule's among the others."""
    if not drop:
        yield
        return
    router = site.router_of(layer)
    device = next(router.parameters()).device
    keep_E = torch.ones(site.num_experts, dtype=torch.bool, device=device)
    keep_E[list(drop)] = False
    bias_E = site.bias_of(layer)

    def reroute(module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, indices = output
        new_weights, new_indices = site.rule.route(logits.float(), bias_E, keep_E)
        return logits, new_weights.to(weights.dtype), new_indices.to(indices.dtype)

    handle = router.register_forward_hook(reroute)
    try:
        yield
    finally:
        handle.remove()
