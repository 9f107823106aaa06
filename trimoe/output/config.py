"""config.json of the result: expert counts and layers as decided, what native code has to know, how experts are packed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from trimoe import modeling_trimoe
from trimoe.errors import UserError
from trimoe.model import depth_config, sublayer, transformers5
from trimoe.model.decision import Decisions, kept_layers
from trimoe.model.skeleton import Skeleton


def native_spec(skeleton: Skeleton, decisions: Decisions) -> dict[str, object] | None:
    """`moe_compression` of the result; None where stock code can express it."""
    kept = kept_layers(skeleton, decisions)
    total, layers = total_of(skeleton, decisions), {}
    for place, index in enumerate(kept):
        entry, decision = dict((skeleton.spec or {}).get("layers", {}).get(str(index), {})), decisions.get(index)
        if decision is not None and decision.gone == "moe":
            if depth_config.zero_block(skeleton, index) is not None:
                continue
            entry = {"dropped": sublayer.dropped_entry(skeleton, index)}
        elif index in skeleton.sites:
            entry.pop("num_experts", None)
            if counted(skeleton, decisions, index) != total:
                entry["num_experts"] = counted(skeleton, decisions, index)
            if decision is not None and decision.factored:
                entry |= {"in_ranks": list(decision.in_ranks or ()), "out_ranks": list(decision.out_ranks or ())}
                if decision.separate:
                    entry["separate"] = True
        if entry:
            layers[str(place)] = entry
    squeezed = any(decision.bitmask for decision in decisions.values() if decision.gone != "block")
    if not layers and not squeezed:
        return None
    site = next(iter(skeleton.sites.values()))
    return {
        "version": 1, "block": site.block, "experts": site.experts, "count_field": skeleton.count_field, "guard": modeling_trimoe.GUARD,
        "layers": layers, **({"bitmask": True} if squeezed else {}),
    }  # fmt: skip


def counted(skeleton: Skeleton, decisions: Decisions, index: int) -> int:
    """The experts that stay in a layer."""
    return len(decisions[index].keep) if index in decisions else skeleton.sites[index].num_experts


def total_of(skeleton: Skeleton, decisions: Decisions) -> int:
    """What config.json says of all layers: the experts that stay, where these are equally many; else those of the source."""
    left = [index for index in skeleton.sites if index not in decisions or decisions[index].gone is None]
    counts = {counted(skeleton, decisions, index) for index in left}
    return counts.pop() if len(counts) == 1 else skeleton.num_experts


def config_of(skeleton: Skeleton, decisions: Decisions) -> dict[str, object]:
    """The source's config.json with the new expert counts and layers. Raises UserError where it cannot describe what is left."""
    config = {key: value for key, value in skeleton.checkpoint.config.items() if key != modeling_trimoe.KEY}
    config.pop("auto_map", None)  # the source's own code is not carried over; transformers has the family
    kept = kept_layers(skeleton, decisions)
    place = {index: new for new, index in enumerate(kept)}
    emptied = [index for index in kept if index in decisions and decisions[index].gone == "moe"]
    field, text = skeleton.count_field, skeleton.config.get_text_config()
    total = total_of(skeleton, decisions)
    inner = depth_config.inner_key(config, field)
    holder: dict[str, object] = dict(config[inner]) if inner else config  # type: ignore[arg-type]
    if len(kept) < len(skeleton.layers):
        holder = depth_config.renumbered(depth_config.explicit(skeleton, holder), kept, len(skeleton.layers))
    for name in (*transformers5.spellings(text, field), *(other for other in transformers5.COUNT_NAMES if other in holder)):
        holder[name] = total
    dense = [index for index in emptied if depth_config.zero_block(skeleton, index) is not None]
    if dense:
        holder |= depth_config.dense_form(skeleton, []) or {}
        holder["mlp_only_layers"] = sorted({place[i] for i in (*(text.mlp_only_layers or ()), *dense) if i in place})
    config = {**config, inner: holder} if inner else holder
    if skeleton.untied:  # not every engine compares both tables as transformers does; without the flag all of them take both
        config["tie_word_embeddings"] = False
        if inner:
            holder["tie_word_embeddings"] = False
    if not any(re.search(transformers5.PREDICTION, name) for name in skeleton.model.state_dict()):
        config = transformers5.without_prediction(config)  # these layers are left out, which engines have to know
    _check_depth(skeleton, config, kept, emptied)
    bits = {(decision.bits, decision.group) for decision in decisions.values() if decision.bits is not None and decision.gone != "block"}
    if bits:
        config["quantization_config"] = quantization_config(skeleton, decisions, *bits.pop(), dense)  # type: ignore[arg-type]
    spec = native_spec(skeleton, decisions)
    if spec is not None or skeleton.spec:
        config["architectures"] = architectures(skeleton, native=spec is not None)
    if spec is not None:
        config[modeling_trimoe.KEY] = spec
        native = modeling_trimoe.PREFIX + modeling_trimoe.stock_class(skeleton.config).__name__
        config["auto_map"] = {"AutoModelForCausalLM": f"modeling_trimoe.{native}"}
    return config


def architectures(skeleton: Skeleton, *, native: bool) -> list[str]:
    """The source's architecture, with the prefix that no other engine knows if the result is native. (Families have it in several spellings,
    and engines know that of the published checkpoints.)"""
    given = skeleton.checkpoint.config.get("architectures")
    first = (
        given[0]
        if isinstance(given, list) and given and isinstance(given[0], str)
        else modeling_trimoe.stock_class(skeleton.config).__name__
    )
    return [(modeling_trimoe.PREFIX if native else "") + first.removeprefix(modeling_trimoe.PREFIX)]


def quantization_config(skeleton: Skeleton, decisions: Decisions, bits: int, group: int, dense: Sequence[int]) -> dict[str, object]:
    """compressed-tensors: every Linear but those listed, which are all that are not in integers, by the names on disk and in modules. Raises
    UserError where names cannot tell."""
    linears = [
        f"{skeleton.layer_name(index)}.{path}.weight" for index, decision in decisions.items() if decision.gone != "block" for path in decision.linears
    ]  # fmt: skip
    elsewhere = {key for name in linears for key in (name, *skeleton.source_keys(name))}
    gone = {
        f"{skeleton.layer_name(index)}." + (f"{skeleton.sites[index].block}." if decision.gone == "moe" else "")
        for index, decision in decisions.items() if decision.gone is not None
    }  # fmt: skip
    elsewhere |= {key for name, keys in skeleton.conversion.source_of.items() if name.startswith(tuple(gone)) for key in (name, *keys)}
    experts = {
        key for index, site in skeleton.sites.items() for path in site.expert_paths()
        for key in skeleton.source_keys(f"{skeleton.layer_name(index)}.{site.block}.{path}")
    }  # fmt: skip
    modules = [f"{name}.weight" for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)]
    matrices = [key for key, info in skeleton.checkpoint.tensors.items() if key not in experts and len(info.shape) == 2]
    zeros = [
        f"{skeleton.layer_name(index)}.{skeleton.sites[index].block}.{name}" for index in dense for name in depth_config.zero_block(skeleton, index) or {}
    ]  # fmt: skip
    names = {key.removesuffix(".weight") for key in (*modules, *matrices, *zeros) if key.endswith(".weight") and key not in elsewhere}
    ignored = {_anywhere(name): name for name in names}
    both = sorted({_anywhere(name.removesuffix(".weight")) for name in linears} & set(ignored))
    if both:
        raise UserError(
            f"quantize: scope: all-linear would leave {ignored[both[0]]} as it is but pack matrices of that name in other layers; use scope: experts."
        )
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": sorted(ignored),
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False},
        }},
    }  # fmt: skip


def _anywhere(name: str) -> str:
    """A module's name as a pattern that fits it in every decoder layer."""
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
    return name if at is None else "re:.*" + re.escape("." + ".".join(parts[at + 1 :])) + "$"


def _check_depth(skeleton: Skeleton, config: dict[str, object], kept: Sequence[int], emptied: Sequence[int]) -> None:
    """Only where layers were dropped: with the old expert counts put back, the new configuration must give the old layers."""
    if len(kept) == len(skeleton.layers) and not emptied:
        return
    field = skeleton.count_field
    inner = depth_config.inner_key(config, field)
    holder: dict[str, object] = dict(config[inner]) if inner else dict(config)  # type: ignore[call-overload]
    for name in (
        *transformers5.spellings(skeleton.config.get_text_config(), field),
        *(other for other in transformers5.COUNT_NAMES if other in holder),
    ):
        holder[name] = skeleton.num_experts
    whole = {**config, inner: holder} if inner else holder
    reason = depth_config.difference(skeleton, whole, kept, emptied)
    if reason is not None:
        gone = sorted(set(range(len(skeleton.layers))) - set(kept))
        raise UserError(f"Without {f'decoder layers {gone}' if gone else f'the MoE blocks of layers {list(emptied)}'}, {reason}.")
