"""The matrices of a decoder layer beside its routed experts and router that may be compressed too: attention, dense MLPs, shared experts;
and what they were given."""

from __future__ import annotations

import torch
from torch import nn

from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton


def linears(skeleton: Skeleton, index: int, *, block: bool) -> dict[str, nn.Linear]:
    """Path -> module of the decoder layer's linears that are one matrix on disk; `block`: those inside the MoE block too."""
    layer, found = skeleton.layers[index], {}
    site = skeleton.sites.get(index)
    without = () if site is None else (f"{site.block}.{site.experts}", f"{site.block}.{site.router}") if block else (site.block,)
    for path, module in layer.named_modules():
        left_out = any(path == prefix or path.startswith(prefix + ".") for prefix in without)
        if isinstance(module, nn.Linear) and module.out_features > 1 and not left_out and _plain(skeleton, index, path, module):
            found[path] = module
    return found


def _plain(skeleton: Skeleton, index: int, path: str, module: nn.Linear) -> bool:
    """Whether the matrix lies on disk as it is: under one key, its numbers in their places."""
    name, tensors = f"{skeleton.layer_name(index)}.{path}.weight", skeleton.checkpoint.tensors
    keys = skeleton.source_keys(name)
    if len(keys) != 1 or tensors[keys[0]].shape != tuple(module.weight.shape) or not keys[0].endswith(".weight"):
        return False

    def unmoved() -> bool:
        numbers = torch.arange(module.weight.numel(), dtype=torch.int32).view(module.weight.shape)
        return all(
            torch.equal(numbers, disk)
            for disk in transformers5.to_disk_format(skeleton.model, {name: numbers}, skeleton.conversion).values()
        )

    return skeleton.remembered(("linear", path, tuple(module.weight.shape)), unmoved)
