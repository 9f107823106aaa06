"""The matrices of a decoder layer beside its routed experts and router that may be compressed too: attention, dense MLPs, shared experts;
and what they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from trimoe import hf
from trimoe.finite import checked
from trimoe.methods import Quantize, WeightPrune
from trimoe.methods.method import Decisions
from trimoe.site import Site
from trimoe.skeleton import Skeleton


def with_linears(skeleton: Skeleton, decisions: Decisions, step: Quantize | WeightPrune, sites: Mapping[int, Site]) -> Decisions:
    """`decisions` with the linears that the step's `scope` has beside the experts of `sites`: "moe" shared experts, "all-linear" all matrices
    of the decoder layers. Layers without experts take over the bits or zeros that the others have."""
    if step.scope == "experts":
        return decisions
    like = next(decision for decision in decisions.values() if decision.changed)
    plain = replace(like, keep=(), in_ranks=None, out_ranks=None, separate=False, merged=False)
    out = dict(decisions)
    for index in range(len(skeleton.layers)):
        decision = decisions.get(index)
        if decision is not None and decision.gone == "block":
            continue
        gone = decision is not None and decision.gone is not None
        found = linears(skeleton, index, block=not gone)
        paths = tuple(
            path
            for path, module in found.items()
            if step.takes(sites.values(), module) and (step.scope == "all-linear" or _inside(skeleton, index, path))
        )
        if paths:
            base = plain if decision is None else replace(plain, gone=decision.gone, keep=decision.keep) if gone else decision
            out[index] = replace(base, linears=paths)
    return out


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


def _inside(skeleton: Skeleton, index: int, path: str) -> bool:
    return index in skeleton.sites and path.startswith(skeleton.sites[index].block + ".")


def _plain(skeleton: Skeleton, index: int, path: str, module: nn.Linear) -> bool:
    """Whether the matrix lies on disk as it is: under one key, its numbers in their places."""
    name, tensors = f"{skeleton.layer_name(index)}.{path}.weight", skeleton.checkpoint.tensors
    keys = skeleton.source_keys(name)
    if len(keys) != 1 or tensors[keys[0]].shape != tuple(module.weight.shape) or not keys[0].endswith(".weight"):
        return False

    def unmoved() -> bool:
        numbers = torch.arange(module.weight.numel(), dtype=torch.int32).view(module.weight.shape)
        return all(torch.equal(numbers, disk) for disk in hf.to_disk_format(skeleton.model, {name: numbers}, skeleton.conversion).values())

    return skeleton.remembered(("linear", path, tuple(module.weight.shape)), unmoved)


class Inputs:
    """Second moments of what a layer's linears are called with while `attached`: `moment(path)` is the mean of x x^T [I, I], float32."""

    def __init__(self, layer: nn.Module, paths: tuple[str, ...]):
        self.modules = {path: layer.get_submodule(path) for path in paths}
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self._latest: tuple[Any, str] = (None, "")

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._see(path)) for path, module in self.modules.items()]
        try:
            yield
        finally:
            self._latest = (None, "")
            for handle in handles:
                handle.remove()

    def _see(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            given, owner = self._latest
            if args[0] is given:  # query, key and value are given the same tensor: one moment serves them all
                self.owner[path] = owner
                return
            self._latest = (args[0], path)
            x_TI = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            self.owner[path] = path
            self.sums[path] = self.sums[path] + x_TI.T @ x_TI if path in self.sums else x_TI.T @ x_TI
            self.tokens[path] = self.tokens.get(path, 0) + len(x_TI)

        return hook

    def moment(self, path: str) -> torch.Tensor | None:
        """None where the module was never called. Raises Inside where it is not finite."""
        owner = self.owner.get(path)
        if owner is None:
            return None
        dtype = next(self.modules[path].parameters()).dtype
        return checked(self.sums[owner] / self.tokens[owner], f"the moments of what {path} is given", dtype)
