"""The bytes of a model by part, before and after: experts, attention, norms and so on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import BITMASK
from trimoe.output.layout import Layout
from trimoe.output.tensor_entry import Entry
from trimoe.show.format import PARTS


def parts(layout: Layout) -> dict[str, Any]:
    """Tensor bytes [before, after] by PARTS, in that order and without those that are nowhere: outside the layers, and of every decoder layer.

    `attention` is whatever mixes tokens (recurrent layers and convolutions too); `shared experts` is what runs beside the routed ones.
    """
    skeleton = layout.skeleton
    layers = {}
    for index in range(len(skeleton.keys_by_layer)):
        gone = index in layout.decisions and layout.decisions[index].gone is not None
        made = layout.entries(index) if index in layout.place else []
        layers[str(index)] = _sizes(skeleton, _part_of(skeleton, index), made, "dense MLPs" if gone else "routed experts")
    return {"outside the layers": _sizes(skeleton, _outside(skeleton), layout.groups[0], "other"), "layers": layers}


def _sizes(skeleton: Skeleton, part_of: Mapping[str, str], made: Sequence[Entry], new: str) -> dict[str, list[int]]:
    """By part: bytes of the source's tensors `part_of` and of those `made` of them; `new`: what is in no place of the source's."""
    sizes = {part: [0, 0] for part in PARTS if part in part_of.values() or (part == new and made)}
    for key, part in part_of.items():
        sizes[part][0] += skeleton.checkpoint.tensors[key].nbytes
    stems = {**part_of, **{key.removesuffix("weight"): part for key, part in part_of.items()}}
    for entry in made:
        if entry.zeros and entry.stands_for == 0:  # the guard of native forms
            sizes.setdefault("other", [0, 0])[1] += entry.nbytes
            continue
        stem = entry.key.removesuffix(BITMASK)
        sizes[stems.get(stem) or stems.get(stem[: stem.rfind(".") + 1]) or new][1] += entry.nbytes
    return {part: sizes[part] for part in PARTS if any(sizes.get(part, ()))}


def _outside(skeleton: Skeleton) -> dict[str, str]:
    """Which part every source tensor outside the layers belongs to."""
    model = skeleton.model
    owners = {id(module): part for module, part in ((model.get_output_embeddings(), "head"), (model.get_input_embeddings(), "embedding"))}
    named: dict[str, str] = {}
    for name, module in model.named_modules():
        part = owners.get(id(module)) or ("norms" if _vectors(module) else "other")
        named |= {f"{name}.{own}": part for own, _ in module.named_parameters(recurse=False)}
    found = dict.fromkeys(skeleton.outer_keys, "other")
    for name, keys in sorted(
        skeleton.conversion.source_of.items(), key=lambda item: named.get(item[0]) == "embedding"
    ):  # a shared table is one
        found |= {key: named.get(name, "other") for key in keys if key in found}
    return found


def _part_of(skeleton: Skeleton, index: int) -> dict[str, str]:
    """Which part every source tensor of a layer belongs to."""
    found, prefix = dict.fromkeys(skeleton.keys_by_layer[index], "other"), f"{skeleton.layer_name(index)}."
    for name, keys in skeleton.conversion.source_of.items():
        if name.startswith(prefix):
            found |= dict.fromkeys(keys, _part(skeleton, index, name.removeprefix(prefix)))
    return found


def _part(skeleton: Skeleton, index: int, path: str) -> str:
    """Of the tensor `path` of a layer."""
    site, child = skeleton.sites.get(index), path.partition(".")[0]
    if site is not None and path.startswith(f"{site.block}."):
        inside = path.removeprefix(f"{site.block}.")
        if inside in site.router_paths():
            return "routers"
        return "routed experts" if inside.startswith(f"{site.experts}.") else "shared experts"
    module = getattr(skeleton.layers[index], child, None)
    if not isinstance(module, nn.Module):
        return "other"
    if _vectors(module):
        return "norms"
    if len(inspect.signature(module.forward).parameters) > 1:  # it is told of other tokens: their mask, their places, its cache
        return "attention"
    return "dense MLPs" if site is None else "shared experts"


def _vectors(module: nn.Module) -> bool:
    return all(parameter.dim() < 2 for parameter in module.parameters())
