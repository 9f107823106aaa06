"""Low-rank adapters by peft on a loaded model: what gets one, attaching, merging, keeping.

LoRA, https://arxiv.org/abs/2106.09685: W + (alpha / rank) B A with B = 0 at the start. Attention and every other linear map of the
decoder layers get adapters, shared experts included, and the experts' stacked weights one an expert; of low-rank experts the factors
do. Never: routers and gates, embeddings, norms, the LM head.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimoe.checkpoint.atomic import disk_errors, write_text
from trimoe.errors import UserError
from trimoe.model.skeleton import Skeleton
from trimoe.recipe.recover import Recover
from trimoe.recover import apart

FILES = ("README.md", "adapter_model.safetensors", "adapter_config.json")  # in the order of writing; the last makes it an adapter
# Last parts of names that peft takes for experts' names of transformers 4 (utils/transformers_weight_conversion.py): as target_modules
# they would silently become the stacked experts of all layers. As parameters they are what they say.
MISTAKEN = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Targets:
    """Full names of the linear modules and of the parameters that get adapters, and the share of the experts' weights among them."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    expert_share: float

    @property
    def weights(self) -> list[str]:
        """The parameters that merging changes."""
        return [*(f"{name}.weight" for name in self.modules), *self.parameters]


def targets(model: nn.Module, skeleton: Skeleton, *, avoid: Collection[str] = ()) -> Targets:
    """What gets an adapter; `avoid`: parameters that get none. Raises UserError where nothing would."""
    routers = [f"{skeleton.layer_name(i)}.{site.block}.{site.router}" for i, site in skeleton.sites.items()]
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(skeleton.prefix + ".") and min(module.weight.shape) > 1  # 1: a gate
        and not any(f"{name}.".startswith(f"{router}.") for router in routers) and f"{name}.weight" not in avoid
    ]  # fmt: skip
    mistaken = [name for name in linear if name.rpartition(".")[2] in MISTAKEN]
    stacks = dict(expert_weights(model, skeleton))
    reached = [name for name in stacks if name not in avoid]
    if not linear and not reached:
        raise UserError(
            f"Every matrix of {skeleton.name} was pruned, and merged adapters would fill the zeros; give adapter: true, or method: logits and train: full."
        )
    share = sum(stacks[name].numel() for name in reached) / max(1, sum(weight.numel() for weight in stacks.values()))
    modules = tuple(name for name in linear if name not in mistaken)
    return Targets(modules, tuple(f"{name}.weight" for name in mistaken) + tuple(reached), share)


def expert_weights(model: nn.Module, skeleton: Skeleton) -> Iterator[tuple[str, nn.Parameter]]:
    """Stacked weights, or low-rank factors, of the routed experts: full name and parameter."""
    for index, site in skeleton.sites.items():
        path = f"{skeleton.layer_name(index)}.{site.block}.{site.experts}"
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.numel() and not name.endswith("_bias"):
                yield f"{path}.{name}", parameter


def attach(model: Any, wanted: Targets, spec: Recover, seed: int) -> Any:
    """The model with adapters that change nothing yet; only they train."""
    peft = import_peft()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=list(wanted.modules),
        target_parameters=list(wanted.parameters),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about names that peft uses
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    reached = sorted(name for name, _ in _reached(adapted))
    assert reached == sorted(wanted.weights), sorted(set(reached) ^ set(wanted.weights))  # peft skips what it does not find
    object.__setattr__(adapted, "trimoe_replaced", apart.take_apart(adapted))  # not a part of it: no parameter is named twice
    return adapted


def _reached(adapted: Any) -> Iterator[tuple[str, Any]]:
    """Full names of the weights that have an adapter, and the adapters."""
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            yield f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}", module


@dataclass(frozen=True)
class Merged:
    """A model whose adapters were taken out, and these by the full names of their weights."""

    model: Any
    adapters: dict[str, Any]


def merged(adapted: Any) -> Merged:
    """Take the adapters out of a model, so that they can be added to its weights."""
    found = dict(sorted(_reached(adapted), key=lambda pair: pair[0]))
    apart.put_back(adapted.trimoe_replaced)
    return Merged(adapted.unload(), found)


def save(adapted: Any, base: Path, aside: Path, out: Path, about: str) -> None:
    """peft's own files, first written to `aside`; `base` is the model they belong to, `about` goes into the card."""
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = str(base.resolve())
    shutil.rmtree(aside, ignore_errors=True)  # peft adds to a card that a killed run left behind, and so would we
    with disk_errors(aside):
        adapted.save_pretrained(aside, save_embedding_layers=False)
    path = aside / FILES[-1]
    body = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "target_parameters"):  # sets in peft: another order in every process
        body[name] = sorted(body[name] or [])
    write_text(path, json.dumps(body, indent=2, sort_keys=True) + "\n")
    with open(aside / FILES[0], "a", encoding="utf-8") as readme:
        readme.write(about)
    for name in FILES:
        os.replace(aside / name, out / name)


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("Adapters need peft: pip install 'trimoe[recover]'.") from None
    return peft


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def described(wanted: Targets) -> dict[str, Any]:
    """For trimoe.json."""
    return {"adapted": len(wanted.weights), "expert_share": wanted.expert_share}
