"""Loads checkpoints whose MoE layers have different numbers of experts or low-rank (factored) experts, or whose zeros are left out. Made by
trimoe.

This one file needs torch and transformers only; a copy of it lies in every such checkpoint, so that

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

works without trimoe. `config.moe_compression` says which layers differ from the stock architecture, and how:

    {"version": 1, "block": "mlp", "experts": "experts", "count_field": "num_local_experts", "guard": "trimoe_guard",
     "layers": {"3": {"num_experts": 5},
                "4": {"num_experts": 5, "in_ranks": [16, 24, ...], "out_ranks": [16, -1, ...]},   (-1: this matrix stays dense)
                "5": {..., "separate": true},   (gate and up have a pair of factors each, both of the expert's rank in in_ranks)
                "6": {"dropped": {"guard": "gate.weight", "norm": "post_attention_layernorm", "pair": false}}}}

Every decoder layer of such a checkpoint holds one number under the name that "guard" says, and config.json's `architectures` bear a prefix
of their own: no engine that knows the stock architecture has either, so it stops instead of reading the rest wrongly. (Checkpoints made
before there was a guard have neither, and load here all the same.)

With "bitmask": true, a tensor that has another beside it named as it is with _bitmask (uint8 [..., I / 8], a bit a weight, lowest first) holds
only the weights [count] whose bits are set; the others are zero. Such tensors are expanded while they are loaded.

Letters: T tokens, k experts per token, E experts, H hidden size, I expert width, O the width of the first projection (2I if gated).
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import _grouped_linear
from transformers.utils import cached_file

# transformers looks for the text "@use_experts_implementation" in a model's source before it lets the implementation be chosen.

KEY = "moe_compression"
PREFIX = "Trimoe"  # before the stock class's name, in `architectures`, `auto_map` and the class itself
GUARD = "trimoe_guard"  # a decoder layer's buffer that stock code does not have
BITMASK = "_bitmask"  # at the end of a key
DENSE = -1  # in place of a rank: the matrix is not factored
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")  # options of what reads files


class FactoredExperts(nn.Module):
    """Experts whose two projections are products of two factors, each matrix with a rank of its own, stored without padding.

    Expert e computes  down(gate(x V_in^T U_in)) with V_in [r_e, H] and U_in [r_e, O]  (gate and up stacked, one input factor), and
    likewise V_out [s_e, I], U_out [s_e, H]; the factors of all experts lie one after the other along the rank axis. Matrices that
    stay dense lie in in_w [number, O, H] and out_w [number, H, I], in the order of their experts. `separate`: gate and up are two
    products, so V_in is [2 r_e, H] and U_in [2 r_e, I], gate's rows before up's.

    The two one-expert buffers under the stock parameters' names are a guard against transformers' own classes, which ignore tensors that
    they do not know: they would load this checkpoint with randomly initialised experts, and meet a shape that they reject.
    """

    def __init__(self, experts: nn.Module, in_ranks: list[int], out_ranks: list[int], separate: bool = False):
        super().__init__()
        for name, value in vars(experts).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        for name, child in experts.named_children():
            setattr(self, name, child)
        self.source_class = type(experts)
        self.in_ranks, self.out_ranks = list(in_ranks), list(out_ranks)
        self.num_experts = len(in_ranks)
        self.parts = 2 if separate and experts.has_gate else 1  # products that make the first projection
        self.places = {"in": _places(in_ranks, self.parts), "out": _places(out_ranks)}
        up, down = first_projection(experts), experts.down_proj
        hidden, width = (down.shape[-1], down.shape[-2]) if experts.is_transposed else (down.shape[-2], down.shape[-1])
        first = self.first_width = up.shape[-1] if experts.is_transposed else up.shape[-2]
        like = {"device": up.device, "dtype": up.dtype}
        for name, ranks, rows, columns, parts in (("in", in_ranks, first, hidden, self.parts), ("out", out_ranks, hidden, width, 1)):
            total, dense = parts * sum(rank for rank in ranks if rank != DENSE), sum(rank == DENSE for rank in ranks)
            self.register_parameter(f"{name}_v", nn.Parameter(torch.zeros(total, columns, **like)) if total else None)
            self.register_parameter(f"{name}_u", nn.Parameter(torch.zeros(total, rows // parts, **like)) if total else None)
            self.register_parameter(f"{name}_w", nn.Parameter(torch.zeros(dense, rows, columns, **like)) if dense else None)
        if experts.has_bias:
            for name, bias in experts.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    self.register_parameter(name, bias)
        guard = "gate_up_proj" if experts.has_gate else "up_proj"
        self.register_buffer(guard, torch.zeros(1, 4 if experts.has_gate else 2, 2, **like))
        self.register_buffer("down_proj", torch.zeros(1, 2, 2, **like))

    def activate(self, first_SO: torch.Tensor) -> torch.Tensor:
        return self.source_class._apply_gate(self, first_SO) if self.has_gate else self.act_fn(first_SO)

    def matrix(self, name: str, expert: int) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(V [r, in], U [r, out], None) or (None, None, W [out, in]) of one expert; all None for rank 0. `name` is "in" or "out". Of
        separate gate and up: V [2r, in], U [2r, out / 2]."""
        rank, start = self.places[name][expert]
        if rank == DENSE:
            return None, None, getattr(self, f"{name}_w")[start]
        if rank == 0:
            return None, None, None
        rows = slice(start, start + rank * (self.parts if name == "in" else 1))
        return getattr(self, f"{name}_v")[rows], getattr(self, f"{name}_u")[rows], None

    @torch.no_grad()
    def set_expert(self, expert: int, cut_in, cut_out) -> None:
        """Fill in one expert; a cut has u_mr and v_rn, or the whole matrix."""
        for name, cut in (("in", cut_in), ("out", cut_out)):
            v, u, w = self.matrix(name, expert)
            if w is not None:
                w.copy_(cut.whole)
            elif v is not None:
                v.copy_(cut.v_rn)
                u.copy_(cut.u_mr.mT)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        top_k = top_k_index.shape[-1]
        if len(top_k_index) == 1:  # decoding: nothing to sort
            y_KH = torch.cat([self._one(hidden_states, expert) for expert in top_k_index[0].tolist()])
            return (top_k_weights.to(y_KH.dtype) @ y_KH).to(hidden_states.dtype)
        expert_S, order_S = torch.sort(top_k_index.reshape(-1), stable=True)
        x_SH = hidden_states[order_S // top_k]
        ends_E = torch.bincount(expert_S, minlength=self.num_experts).cumsum(0)
        one_rank = {*self.in_ranks}.union(self.out_ranks).isdisjoint({DENSE, 0}) and len({*self.in_ranks}) == len({*self.out_ranks}) == 1
        if one_rank and x_SH.is_cuda:
            y_SH = self._grouped(x_SH, expert_S, ends_E.int())
        else:
            y_SH = self._looped(x_SH, ends_E.tolist())
        weighted_SH = y_SH * top_k_weights.reshape(-1)[order_S].unsqueeze(-1)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return weighted_SH[back_S].view(-1, top_k, weighted_SH.shape[-1]).sum(1).to(hidden_states.dtype)

    def _looped(self, x_SH: torch.Tensor, ends: list[int]) -> torch.Tensor:
        """One expert after the other; needs the token counts on the host (one synchronisation a layer)."""
        parts, start = [x_SH.new_empty(0, x_SH.shape[-1])], 0
        for expert, end in enumerate(ends):
            if end > start:
                parts.append(self._one(x_SH[start:end], expert))
            start = end
        return torch.cat(parts)

    def _one(self, x_SH: torch.Tensor, expert: int) -> torch.Tensor:
        up_bias, down_bias = self._biases()
        first = self.first(x_SH, self.matrix("in", expert))
        h = self.activate(first if up_bias is None else first + up_bias[expert])
        y = _apply(h, self.matrix("out", expert), x_SH.shape[-1])
        y = y if down_bias is None else y + down_bias[expert]
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def first(self, x_SH: torch.Tensor, matrix: tuple) -> torch.Tensor:
        """The first projection [S, O] by one expert's `matrix`."""
        v, u, _ = matrix
        if self.parts == 1 or v is None:
            return _apply(x_SH, matrix, self.first_width)
        inner = F.linear(x_SH, v).view(len(x_SH), self.parts, len(v) // self.parts).transpose(0, 1)
        return self.joined(torch.bmm(inner, u.view(self.parts, -1, u.shape[-1])))

    def joined(self, parts: Any) -> torch.Tensor:
        """Gate and up [S, I], or more of the kind, as the first projection's columns [S, O] have them: one after the other, or in turn."""
        return torch.cat([*parts], -1) if self.is_concatenated else torch.stack([*parts], -1).flatten(-2)

    def _grouped(self, x_SH: torch.Tensor, expert_S: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """Equal ranks on a GPU: grouped matrix products, nothing waits for the host."""
        up_bias, down_bias = self._biases()
        count = self.num_experts
        first = _grouped_linear(x_SH, self.in_v.view(count, -1, self.in_v.shape[-1]), ends_E)
        u_EPRO = self.in_u.view(count, self.parts, -1, self.in_u.shape[-1])
        inner = zip(first.chunk(self.parts, -1), u_EPRO.unbind(1), strict=True)
        first = self.joined([_grouped_linear(part, u, ends_E, is_transposed=True) for part, u in inner])
        h = self.activate(first if up_bias is None else first + up_bias[expert_S])
        y = _grouped_linear(h, self.out_v.view(count, -1, self.out_v.shape[-1]), ends_E)
        y = _grouped_linear(y, self.out_u.view(count, -1, self.out_u.shape[-1]), ends_E, is_transposed=True)
        y = y if down_bias is None else y + down_bias[expert_S]
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        up = getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias", None)
        return up, getattr(self, "down_proj_bias", None)


def _places(ranks: list[int], parts: int = 1) -> list[tuple[int, int]]:
    """Each matrix's rank, and where its factors (of each of its `parts`) begin along the rank axis, or which of the dense matrices it is."""
    places, factors, dense = [], 0, 0
    for rank in ranks:
        places.append((rank, dense if rank == DENSE else factors))
        factors, dense = factors + max(rank, 0) * parts, dense + (rank == DENSE)
    return places


class NoBlock(nn.Module):
    """In the place of a dropped MoE block: adds nothing to the residual stream. `pair`: the block's caller wants (hidden, None).

    Its one buffer, under the name of the router's weight and of another shape, is the guard (see FactoredExperts).
    """

    def __init__(self, guard: str, pair: bool):
        super().__init__()
        self.pair = pair
        owner, _, leaf = guard.rpartition(".")
        inner: nn.Module = self
        for part in owner.split(".") if owner else ():
            inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.register_buffer(leaf, torch.zeros(2, 2))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


def drop_block(layer: nn.Module, block: str, guard: str, norm: str, pair: bool) -> None:
    """Take a MoE block and the norm before it out of a decoder layer."""
    parent, _, leaf = block.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, NoBlock(guard, pair))
    setattr(layer, norm, nn.Identity())


def _apply(x: torch.Tensor, matrix: tuple, width: int) -> torch.Tensor:
    v, u, w = matrix
    if w is not None:
        return F.linear(x, w)
    return x.new_zeros(len(x), width) if v is None else F.linear(x, v) @ u


def first_projection(experts: nn.Module) -> torch.Tensor:
    """The stacked weight of the first projection: gate and up together, or up alone."""
    return experts.gate_up_proj if experts.has_gate else experts.up_proj


def expand(values_N: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """The dense tensor [..., I] of its kept values, in row order, and their bitmask uint8 [..., I / 8]."""
    kept = bits_of(bitmask)
    if int(kept.sum()) != len(values_N):
        raise ValueError(f"A bitmask of {int(kept.sum())} weights has {len(values_N)} values beside it: the checkpoint is damaged.")
    return torch.zeros(kept.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter_(kept, values_N)


def bits_of(bitmask: torch.Tensor) -> torch.Tensor:
    """uint8 [..., I / 8] -> bool [..., I]."""
    return (bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmask.device) & 1).flatten(-2).bool()


def _expanded(name: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint with bitmasks, dense."""
    hub = {key: options[key] for key in HUB if key in options}
    index = json.loads(Path(cached_file(name, "model.safetensors.index.json", **hub)).read_text(encoding="utf-8"))
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(cached_file(name, shard, **hub), "pt") as file:
            keys = set(file.keys())
            for key in keys:
                if not key.endswith(BITMASK):
                    tensor = file.get_tensor(key)
                    state[key] = expand(tensor, file.get_tensor(key + BITMASK)) if key + BITMASK in keys else tensor
    return state


def _as_if_read_from(name: str, model: Any, options: dict[str, Any]) -> None:
    """What transformers does not do for a model made of given tensors; and that model has no bitmasks any more, nor has it when saved."""
    model.name_or_path = model.config.name_or_path = name
    setattr(model.config, KEY, {key: value for key, value in getattr(model.config, KEY).items() if key != "bitmask"})
    if options.get("generation_config") is None and model.can_generate():
        with suppress(OSError):  # the folder has none: what the configuration says stays
            model.generation_config = GenerationConfig.from_pretrained(name, **{key: options[key] for key in HUB if key in options})


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    marked = set(model._no_split_modules or ())
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and all(type(n).__name__ in marked for n in m)]
    return max(lists, key=len)


def reshape(model: PreTrainedModel) -> None:
    """Give a freshly built stock model (usually on the meta device) the shapes that its `config.moe_compression` describes."""
    spec, layers = getattr(model.config, KEY), decoder_layers(model)
    donors: dict[int, nn.ModuleList] = {}
    if "guard" in spec:
        for layer in layers:
            layer.register_buffer(spec["guard"], torch.zeros(1))
    for index, entry in spec["layers"].items():
        layer = layers[int(index)]
        if "dropped" in entry:
            drop_block(layer, spec["block"], **entry["dropped"])
            continue
        count = entry.get("num_experts")
        if count is not None:
            if count not in donors:
                donors[count] = _donor_layers(model, spec["count_field"], count)
            block = donors[count][int(index)].get_submodule(spec["block"])
            _adopt(model, layer, spec["block"], block)
        if "in_ranks" in entry:
            block = layer.get_submodule(spec["block"])
            experts = getattr(block, spec["experts"])
            setattr(block, spec["experts"], FactoredExperts(experts, entry["in_ranks"], entry["out_ranks"], entry.get("separate", False)))


def _donor_layers(model: PreTrainedModel, count_field: str, count: int) -> nn.ModuleList:
    """The decoder layers of the same architecture with `count` experts everywhere: every shape follows without knowing any class."""
    config = copy.deepcopy(model.config)
    delattr(config, KEY)
    setattr(config.get_text_config(), count_field, count)
    with torch.device("meta"):
        return decoder_layers(stock_class(config)(config))


def _adopt(model: PreTrainedModel, layer: nn.Module, name: str, block: nn.Module) -> None:
    old = layer.get_submodule(name)
    text_config = model.config.get_text_config()
    for module in block.modules():  # the implementation of attention and experts follows the model's own configuration
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = text_config
    device = next(old.parameters()).device
    if device.type != "meta":
        block.to_empty(device=device)
        for module in block.modules():
            model._init_weights(module)
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, block)


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class that transformers itself has for this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(importlib.import_module("transformers"), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def balanced(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A family's load-balancing loss, which also takes layers of different numbers of experts: it is then the mean of the layers' own losses.
    (Where all layers have `num_experts`, it is the stock one, which sums over layers first.)"""

    @functools.wraps(stock)
    def loss(gate_logits: Any, num_experts: int | None = None, top_k: int = 2, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(gate_logits, tuple) or all(logits.shape[-1] == num_experts for logits in gate_logits):
            return stock(gate_logits, num_experts, top_k, *args, **kwargs)
        counts = [logits.shape[-1] for logits in gate_logits]
        each = [stock((logits,), count, min(top_k, count), *args, **kwargs) for logits, count in zip(gate_logits, counts, strict=True)]
        return torch.stack([one.to(each[0].device) for one in each]).mean()

    loss.trimoe = True  # type: ignore[attr-defined]
    return loss


def _balance(stock: type[PreTrainedModel]) -> None:
    """Let the functions of the stock class's module call `balanced`, which gives what theirs gives wherever theirs gives anything."""
    module, name = sys.modules[stock.__module__], "load_balancing_loss_func"
    if hasattr(module, name) and not hasattr(getattr(module, name), "trimoe"):
        setattr(module, name, balanced(getattr(module, name)))


_native: dict[type, type[PreTrainedModel]] = {}


def native_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`stock`, reshaped after construction when the configuration asks for it; else unchanged. Its name has the prefix, which
    transformers writes into `architectures` when such a model is saved."""
    if stock not in _native:
        _balance(stock)

        def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            stock.__init__(self, config, *args, **kwargs)
            if getattr(config, KEY, None):
                reshape(self)
                self.post_init()

        def from_pretrained(cls: Any, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
            if not (getattr(config, KEY, None) or {}).get("bitmask") or name is None:
                return stock.from_pretrained.__func__(cls, name, *args, config=config, **kwargs)
            kwargs["state_dict"] = _expanded(str(name), kwargs)
            found = stock.from_pretrained.__func__(cls, None, *args, config=config, **kwargs)
            _as_if_read_from(str(name), found[0] if isinstance(found, tuple) else found, kwargs)
            return found

        _native[stock] = type(
            PREFIX + stock.__name__,
            (stock,),
            {"__init__": __init__, "from_pretrained": classmethod(from_pretrained), "__module__": __name__, "__doc__": stock.__doc__,
             "_auto_class": "AutoModelForCausalLM", "_can_set_experts_implementation_cached_value": True, "_can_set_attn_implementation_cached_value": True},
        )  # fmt: skip
    return _native[stock]


def __getattr__(name: str) -> type[PreTrainedModel]:
    """`auto_map` names a class: `modeling_trimoe.TrimoeMixtralForCausalLM` is made of MixtralForCausalLM when it is asked for."""
    stock = None if name.startswith("_") else getattr(importlib.import_module("transformers"), name.removeprefix(PREFIX), None)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return native_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
