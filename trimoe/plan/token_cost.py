"""What one token costs: the parameters and FLOPs that it passes, and what the cache keeps of it. No weight is read.

FLOPs per token are 2 for every parameter of a matrix that a token is multiplied with (of E experts k, of the embeddings none, the head
once) plus attention at a stated context of L tokens: 2 L heads (key size + value size) in a layer that attends to all of them, the window
in the place of L where there is one, 4 for each number of a recurrent state. What a layer caches is found by running the architecture,
hollow, on the meta device (MoE experts stand still) and looking at the tensors that it keeps.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trimoe.checkpoint.headers import DTYPES
from trimoe.errors import FOREIGN, stop_if_told
from trimoe.methods.low_rank.low_rank import factor_share
from trimoe.model import depth_config, layer_call, transformers5
from trimoe.model.decision import LayerDecision
from trimoe.model.moe_block import MoeBlock, tensor_at
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.show.format import PER

CONTEXT = 4096  # tokens of context that FLOPs per token are stated for, or the model's own if it is shorter

Kind = Literal["all tokens", "latent", "window", "state", "nothing"]


@dataclass(frozen=True)
class LayerCache:
    """What a decoder layer keeps of one sequence: `token_bytes` for each token (the last `window` - 1 of them where there is a window), and
    `state_bytes` whatever the length. `attend`: FLOPs of attention for each token of context; `step`: of the state, for each new token."""

    kind: Kind
    token_bytes: int = 0
    state_bytes: int = 0
    window: int | None = None
    attend: int = 0
    step: int = 0

    def nbytes(self, tokens: int) -> int:
        """After a sequence of so many tokens."""
        return self.state_bytes + self.token_bytes * (tokens if self.window is None else min(tokens, self.window - 1))

    def flops(self, context: int) -> int:
        return self.step + self.attend * (context if self.window is None else min(context, self.window))


def context_of(skeleton: Skeleton) -> int:
    return min(CONTEXT, skeleton.context)


def caches(skeleton: Skeleton) -> list[LayerCache] | None:
    """Of every decoder layer; None of an architecture that does not run hollow."""

    def found() -> list[LayerCache] | None:
        try:
            return list(_caches(skeleton))
        except FOREIGN as error:
            stop_if_told(error)
            return None

    return skeleton.remembered("caches", found)


@torch.no_grad()
def _caches(skeleton: Skeleton) -> Iterator[LayerCache]:
    first, text = _first_alike(skeleton), skeleton.config.get_text_config()
    model = copy.deepcopy(skeleton.model, {id(skeleton.layers[index]): skeleton.layers[index] for index in first if first[index] != index})
    layers = transformers5.decoder_layers(model)[1]
    for index, like in first.items():
        if like != index:
            layers[index] = layer_call.Stand(layers[index])
        elif index in skeleton.sites:
            experts = skeleton.sites[index].experts_of(layers[index])
            experts.forward = lambda hidden_states, *rest, **named: torch.zeros_like(hidden_states)
    model = model.to("meta", cache_dtype(skeleton))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=True).past_key_values
    beside = [value for name, value in vars(kept).items() if name != "layers" and isinstance(value, list) and len(value) == len(layers)]
    heads, latent = text.num_attention_heads, getattr(text, "kv_lora_rank", None)
    for index in first.values():
        held = kept.layers[index] if index < len(kept.layers) else None
        keys, values = getattr(held, "keys", None), getattr(held, "values", None)
        state = (
            [tensor for name, value in vars(held).items() if name not in ("keys", "values") for tensor in _tensors(value)] if held else []
        )
        state += [tensor for value in beside for tensor in _tensors(value[index])]
        sizes = sum(tensor.nbytes for tensor in state), 4 * sum(tensor.numel() for tensor in state)
        if not isinstance(keys, torch.Tensor) or not keys.numel():
            yield LayerCache("state" if state else "nothing", state_bytes=sizes[0], step=sizes[1])
            continue
        assert isinstance(values, torch.Tensor)
        widths = (text.qk_head_dim, text.v_head_dim) if latent else (keys.shape[-1], values.shape[-1])
        window = getattr(held, "sliding_window", None)
        yield LayerCache(
            "latent" if latent else "window" if window else "all tokens", (keys.nbytes + values.nbytes) // keys.shape[-2], sizes[0], window,
            2 * heads * sum(widths), sizes[1],
        )  # fmt: skip


def _first_alike(skeleton: Skeleton) -> dict[int, int]:
    """Decoder layer -> the first one that is as it is in all but its number, and so keeps as much: the others need not run. Where layers hand
    each other more than hidden states, each runs."""
    return {index: index for index in range(len(skeleton.layers))} if skeleton.passed_on else depth_config.first_alike(skeleton)


def cache_dtype(skeleton: Skeleton) -> torch.dtype:
    """In which the model is loaded where nothing else is asked for: config.json's, else that of its embeddings."""
    named = getattr(skeleton.config.get_text_config(), "dtype", None)
    return named if isinstance(named, torch.dtype) else DTYPES[skeleton.checkpoint.tensors[skeleton.outer_keys[0]].dtype]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and value.dim():
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


# ---- parameters


def expert_parameters(skeleton: Skeleton, site: MoeBlock, decision: LayerDecision) -> int:
    """Of a layer's routed experts, biases included."""
    biases = sum(
        math.prod(tensor.shape[1:])
        for name, tensor in site.experts_of(skeleton.layers[site.layer]).named_parameters(recurse=False)
        if name.endswith("_bias")
    )
    return expert_matrices(skeleton, site, decision) + len(decision.keep) * biases


def expert_matrices(skeleton: Skeleton, site: MoeBlock, decision: LayerDecision) -> int:
    """The same without biases."""
    if decision.factored:
        return factor_share(decision, site)
    if site.factored:
        parts = site.experts_of(skeleton.layers[site.layer]).named_parameters()
        return sum(tensor.numel() for name, tensor in parts if not name.endswith("_bias"))
    return len(decision.keep) * (site.first * site.hidden + site.hidden * site.width)


def used_share(site: MoeBlock, decision: LayerDecision) -> float:
    """How much of a layer's routed experts one token passes."""
    return min(1.0, site.rule.top_k / len(decision.keep))


def multiplied(skeleton: Skeleton, index: int, decision: LayerDecision | None) -> int:
    """Parameters of the decoder layer's matrices that one token is multiplied with."""
    layer, site = skeleton.layers[index], skeleton.sites.get(index)
    if decision is not None and decision.gone == "block":
        return 0
    parameters = {name: tensor for name, tensor in layer.named_parameters() if tensor.dim() > 1}
    if site is None or decision is None or not (decision.keep or decision.gone):
        return sum(tensor.numel() for tensor in parameters.values())
    if decision.gone == "moe":
        zeros = depth_config.zero_block(skeleton, index) or {}  # an MLP of zeros is multiplied with, too
        outside = sum(tensor.numel() for name, tensor in parameters.items() if not name.startswith(site.block + "."))
        return outside + sum(math.prod(shape) for shape in zeros.values() if len(shape) > 1)
    experts = f"{site.block}.{site.experts}."
    rest = sum(tensor.numel() for name, tensor in parameters.items() if not name.startswith(experts))
    router = sum(tensor.numel() for path in site.router_paths() if (tensor := tensor_at(site.block_of(layer), path)).dim() > 1)
    left = router * len(decision.keep) // site.num_experts
    return rest - router + left + round(expert_matrices(skeleton, site, decision) * used_share(site, decision))


def head_matrix(skeleton: Skeleton) -> int:
    """Parameters of the output head, tied to the embeddings or not."""
    head = skeleton.model.get_output_embeddings()
    return 0 if head is None else head.weight.numel()


# ---- layer by layer


@dataclass(frozen=True)
class LayerCosts:
    """One decoder layer: tensor bytes on disk, parameters, those of them that one token uses, FLOPs per token, and what it caches."""

    nbytes: int
    parameters: int
    active: int
    experts: int
    flops: int
    cache: LayerCache | None

    def to_json(self) -> dict[str, Any]:
        cached = None if self.cache is None else {"kind": self.cache.kind, "bytes": self.cache.nbytes(PER), "fixed": self.cache.state_bytes}
        return {"bytes": self.nbytes, "parameters": self.parameters, "active": self.active, "flops": self.flops, "cache": cached}


GONE = LayerCache("nothing")


def of_layers(skeleton: Skeleton, layout: Layout) -> list[LayerCosts]:
    """Of every decoder layer of a layout, by its old number."""
    found, context = [], context_of(skeleton)
    kept = caches(skeleton)
    for index in range(len(skeleton.layers)):
        cache = None if kept is None else kept[index]
        decision, site = layout.decisions.get(index), skeleton.sites.get(index)
        entries = layout.groups[index + 1]
        parameters = entries.parameters
        experts = inactive = 0
        if site is not None and decision is not None and decision.gone is None:
            experts = expert_parameters(skeleton, site, decision)
            inactive = experts - round(experts * used_share(site, decision))
        if decision is not None and decision.gone == "block":
            cache = GONE
        flops = 2 * multiplied(skeleton, index, decision) + (cache.flops(context) if cache is not None else 0)
        found.append(LayerCosts(entries.nbytes, parameters, parameters - inactive, experts, flops, cache))
    return found
