"""What config.json says about decoder layers one by one, for models that lose some: lists and counts that go by a layer's number.

Whether the result is right is not believed but checked: every layer that stays must come out of the new configuration as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trimoe import modeling_trimoe
from trimoe.errors import UserError, first_line, stop_if_told
from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton

# Fields that list layers by number, and those that count layers from the first on. (Lists as long as the model has layers, one entry a
# layer, are found by their length.)
LISTING = ("mlp_only_layers", "moe_layers", "no_rope_layers", "full_attention_layers", "attn_layer_indices", "global_attn_idx")
COUNTING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
ZERO_WIDTH = 16  # of the dense MLP of zeros in the place of a dropped block: small, and a multiple that kernels like


def renumbered(config: Mapping[str, Any], kept: Sequence[int], old: int) -> dict[str, Any]:
    """`config` (the text model's part) of the model that keeps the decoder layers `kept` of `old`."""
    if len(kept) == old:
        return dict(config)
    place = {index: new for new, index in enumerate(kept)}
    out = dict(config)
    for name, value in config.items():
        if name in LISTING and isinstance(value, list) and len(value) != old:
            out[name] = [place[index] for index in value if index in place]
        elif isinstance(value, list) and len(value) == old:
            out[name] = [value[index] for index in kept]
        elif name in COUNTING and isinstance(value, int):
            out[name] = sum(index < value for index in kept)
        elif name == "moe_layer_end_index" and isinstance(value, int):
            out[name] = sum(index <= (value if value >= 0 else old + value) for index in kept) - 1
    out["num_hidden_layers"] = len(kept)
    return out


def explicit(skeleton: Skeleton, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the per-layer lists written out that transformers computes where they are missing."""
    text, count = skeleton.config.get_text_config(), len(skeleton.layers)
    known = {name: list(value) for name, value in vars(text).items() if isinstance(value, (list, tuple)) and len(value) == count}
    given = {name: value for name, value in config.items() if value is not None or name not in known}
    return {**{name: value for name, value in known.items() if all(isinstance(v, (str, int, float, bool)) for v in value)}, **given}


def difference(skeleton: Skeleton, config: Mapping[str, Any], kept: Sequence[int], without: Sequence[int]) -> str | None:
    """What comes out of `config` (whole, as JSON) otherwise than it was in the layers `kept`; None if nothing does. Of the layers
    `without`, everything but the MoE block is compared."""
    try:
        _, layers = transformers5.decoder_layers(
            transformers5.build_meta(transformers5.config_from(config, skeleton.config), skeleton.dtype)
        )
    except Exception as error:  # validators and constructors of every family raise types of their own
        stop_if_told(error)
        return f"transformers cannot build it ({first_line(error)})"
    kinds = [
        set(getattr(of.get_text_config(), "layer_types", None) or ())
        for of in (skeleton.config, transformers5.config_from(config, skeleton.config))
    ]
    if kinds[0] - kinds[1]:
        return f"no layer of kind {sorted(kinds[0] - kinds[1])[0]} would be left"
    if len(layers) != len(kept):
        return f"{len(layers)} layers come out instead of {len(kept)}"
    before, block = _stock_layers(skeleton), next(iter(skeleton.sites.values())).block
    for new, index in enumerate(kept):
        found = unlike(before[index], layers[new], block if index in without else None)
        if found is not None:
            return f"layer {index} would become another kind of layer ({found})"
    return None


def _stock_layers(skeleton: Skeleton) -> nn.ModuleList:
    """The decoder layers that the source's own config.json gives in stock code: what a native source adds to them is carried over."""
    if not skeleton.spec:
        return skeleton.layers
    config = _plain_config(skeleton)
    return skeleton.remembered(
        "stock layers",
        lambda: transformers5.decoder_layers(transformers5.build_meta(transformers5.config_from(config, skeleton.config), skeleton.dtype))[
            1
        ],
    )


def unlike(before: nn.Module, after: nn.Module, ignored: str | None = None) -> str | None:
    """In what two decoder layers differ beside their numbers; None if in nothing. What lies under `ignored` is not compared."""

    def parts(layer: nn.Module) -> dict[str, nn.Module]:
        return {n: m for n, m in layer.named_modules() if ignored is None or not (n == ignored or n.startswith(ignored + "."))}

    old, new = parts(before), parts(after)
    if old.keys() != new.keys():
        return f"{sorted(old.keys() ^ new.keys())[0]} is in one of them only"
    for name in old:
        a, b = old[name], new[name]
        if type(a) is not type(b):
            return f"{name} is a {type(b).__name__}, was a {type(a).__name__}"
        if _settings(a) != _settings(b):
            changed = sorted(key for key in _settings(a) if _settings(a)[key] != _settings(b).get(key)) or ["its settings"]
            return f"{name or 'the layer'}: {changed[0]} changes"
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(a, kind).items():
                other = getattr(b, kind).get(key)
                if (tensor is None) != (other is None) or (tensor is not None and tensor.shape != other.shape):
                    return f"{name}.{key} has another shape"
                if tensor is not None and not tensor.is_meta and not torch.equal(tensor, other):
                    return f"{name}.{key} has other values"
    return None


def first_alike(skeleton: Skeleton) -> dict[int, int]:
    """Decoder layer -> the first one that is as it is in all but its number."""

    def found() -> dict[int, int]:
        kinds = getattr(skeleton.config.get_text_config(), "layer_types", None) or [None] * len(skeleton.layers)
        out: dict[int, int] = {}
        for index, layer in enumerate(skeleton.layers):
            before = [like for like in sorted(set(out.values())) if kinds[like] == kinds[index]]
            out[index] = next((like for like in before if unlike(skeleton.layers[like], layer) is None), index)
        return out

    return skeleton.remembered("first alike", found)


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {
        name: value for name, value in vars(module).items()
        if not name.startswith("_") and "layer_idx" not in name and name not in ("training", "layer_number")
        and (isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)))
    }  # fmt: skip


def droppable_blocks(skeleton: Skeleton) -> list[int]:
    """Decoder layers without which config.json can still describe the others. Raises UserError if there is none."""
    return skeleton.remembered("droppable blocks", lambda: _droppable_blocks(skeleton))


def _droppable_blocks(skeleton: Skeleton) -> list[int]:
    count = len(skeleton.layers)
    if count == 1:
        raise UserError(f"block_drop: {skeleton.name} has one decoder layer, which must stay.")
    config, reason = _plain_config(skeleton), None

    def fits(index: int) -> str | None:
        kept = [i for i in range(count) if i != index]
        return difference(skeleton, with_text(config, renumbered(text_of(config), kept, count)), kept, ())

    # Where the lists are explicit every layer can go; where a pattern is computed from the number, perhaps only the last can.
    ends = [fits(0), fits(count // 2)]
    if ends == [None, None]:
        return list(range(count))
    found = []
    for index in range(count):
        reason = fits(index)
        if reason is None:
            found.append(index)
    if not found:
        raise UserError(
            f"block_drop: {skeleton.name} ({skeleton.config.model_type}) gives layers their kind by their number, and without one of them "
            f"{reason}; use layer_drop or expert_drop."
        )
    return found


def dense_form(skeleton: Skeleton, dropped: Sequence[int]) -> dict[str, Any] | None:
    """The config fields by which stock code builds a dense MLP in place of the MoE blocks `dropped`; None where it cannot."""
    text = skeleton.config.get_text_config()
    if not hasattr(text, "mlp_only_layers") or not hasattr(text, "intermediate_size"):
        return None
    return {"mlp_only_layers": sorted({*(text.mlp_only_layers or ()), *dropped}), "intermediate_size": ZERO_WIDTH}


def zero_block(skeleton: Skeleton, index: int) -> dict[str, tuple[int, ...]] | None:
    """Name in the block -> shape of the dense MLP that stands in for layer `index`'s dropped MoE block in stock code; None where stock
    code has no such form, or the model has dense layers of another width beside."""
    return skeleton.remembered("zero blocks", lambda: _zero_blocks(skeleton))[index]


def _zero_blocks(skeleton: Skeleton) -> dict[int, dict[str, tuple[int, ...]] | None]:
    """Of every MoE layer. They are built with all blocks dropped at once: stock code lists the layers that are dense one by one."""
    fields, every = dense_form(skeleton, list(skeleton.sites)), list(range(len(skeleton.layers)))
    if fields is None:
        return dict.fromkeys(skeleton.sites)
    config = _plain_config(skeleton)
    config = with_text(config, {**text_of(config), **fields})
    if difference(skeleton, config, every, list(skeleton.sites)) is not None:
        return dict.fromkeys(skeleton.sites)
    _, layers = transformers5.decoder_layers(transformers5.build_meta(transformers5.config_from(config, skeleton.config), skeleton.dtype))
    return {index: _zero_block(site.block_of(layers[index])) for index, site in skeleton.sites.items()}


def _zero_block(block: nn.Module) -> dict[str, tuple[int, ...]] | None:
    state = block.state_dict()
    if any(transformers5.is_decorated(module) for module in block.modules()) or any(name.endswith("bias") for name in state):
        return None
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _plain_config(skeleton: Skeleton) -> dict[str, Any]:
    config = copy.deepcopy(skeleton.checkpoint.config)
    for name in (modeling_trimoe.KEY, "auto_map", "quantization_config"):
        config.pop(name, None)
    inner = inner_key(config, skeleton.count_field)
    text = explicit(skeleton, config[inner] if inner else config)
    return {**config, inner: text} if inner else text


def inner_key(config: Mapping[str, Any], field: str) -> str | None:
    """Under which key the text model's fields lie, where they do not lie at the top."""
    return next((key for key, value in config.items() if isinstance(value, dict) and field in value), None)


def text_of(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = inner_key(config, "num_hidden_layers")
    return config[inner] if inner else dict(config)


def with_text(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    inner = inner_key(config, "num_hidden_layers")
    return {**config, inner: dict(text)} if inner else dict(text)
