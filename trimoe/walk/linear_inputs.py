"""What the linear layers of a decoder layer are given: the second moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimoe.walk.finite import checked


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
