"""What tests of weight_prune share: tensors as they lie on disk, and the papers' formulas in float64 (`scores`, `lawful`).

Random weights have no ties; but scores are float32 in the product and float64 here, so weights whose scores lie within 1e-5 of each other
may change places.

Letters: O outputs, I inputs of a matrix, T tokens, S routed tokens of one expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
from safetensors.torch import load_file

import trimoe
from trimoe.compress import calibration_for
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET
from trimoe.text.spec import CalibrationSpec
from trimoe.walk.walk import LayerWalk

ALL = sorted(families.FAMILIES)
# One matrix a key; transposed, interleaved, biased and stacked on disk; stacked; dense first layers; every second layer; a correction bias.
SPREAD = ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3", "jamba", "ernie4_5_moe"]
FEW = ["gpt_oss", "granitemoe", "qwen2_moe"]
NEAR = 1e-5
Folder = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def step(**fields: Any) -> dict[str, Any]:
    return {"weight_prune": fields}


def named(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def compress(source: Path, text: Path, out: Path, *steps: dict[str, Any], samples: int = 4, length: int = 32) -> trimoe.Result:
    return trimoe.compress(source, {"steps": list(steps)}, out, calibration=[str(text)], samples=samples, length=length)


def tokens(folder: Path, text: Path, samples: int = 4, length: int = 32) -> torch.Tensor:
    """What `compress` calibrates on."""
    spec = CalibrationSpec(data=[str(text)], samples=samples, length=length)
    return calibration_for(Skeleton.of(str(folder)), spec, 0, QUIET).samples_NL


def disk(folder: Path) -> Tensors:
    """The tensors as they lie in the files."""
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def dense(folder: Path) -> Tensors:
    """The tensors with bitmasks expanded, numpy's way, and without the guard of the native form."""
    raw, out = disk(folder), {}
    for key, tensor in raw.items():
        if key + "_bitmask" in raw:
            kept = torch.from_numpy(np.unpackbits(raw[key + "_bitmask"].numpy(), axis=-1, bitorder="little")).bool()
            out[key] = torch.zeros(kept.shape, dtype=tensor.dtype)
            out[key][kept] = tensor
        elif not key.endswith(("_bitmask", ".trimoe_guard")):
            out[key] = tensor
    return out


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def whole_layers(skeleton: Skeleton) -> Iterator[tuple[int, torch.nn.Module]]:
    walk = LayerWalk(skeleton, [])
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            yield index, layer


def whole_stacks(folder: Path) -> dict[int, list[torch.Tensor]]:
    """`stacks` of every layer that has experts."""
    skeleton = Skeleton.of(str(folder))
    return {i: stacks(skeleton.sites[i].experts_of(layer)) for i, layer in whole_layers(skeleton) if i in skeleton.sites}


def stacks(experts: Any) -> list[torch.Tensor]:
    """The first projections [E, O, H] and the last [E, H, I]."""
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return [tensor.detach().mT if experts.is_transposed else tensor.detach() for tensor in (first, experts.down_proj)]


@torch.no_grad()
def inputs_of(model: Any, module: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that the stock model's own forward calls a module with."""
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(lambda m, a, k: seen.append([*a, *k.values()]), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    (given,) = seen
    return [part.detach().clone() for part in given[:3]]


@torch.no_grad()
def scores(experts: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor, score: str) -> list[list[torch.Tensor]]:
    """The papers' formula in float64, |w| sqrt(sum over the expert's tokens of (gate input)^2): for each expert, of its two matrices."""
    wide = copy.deepcopy(experts).double()
    out = []
    for expert, (w_in, w_out) in enumerate(zip(*stacks(wide), strict=True)):
        tokens, places = (index_TK == expert).nonzero(as_tuple=True)
        gate_S1 = gate_TK[tokens, places, None].double() if score == "moe_pruner" else torch.ones(len(tokens), 1)
        x_SH = x_TH[tokens].double()
        first_SO = x_SH @ w_in.T + (wide.gate_up_proj_bias[expert] if wide.has_bias else 0)
        both = []
        for weight, given in ((w_in, x_SH), (w_out, wide._apply_gate(first_SO))):
            norm_I = (gate_S1 * given).square().sum(0).sqrt()
            both.append(weight.abs() * (1 if score == "magnitude" or not len(tokens) else norm_I))
        out.append(both)
    return out


def lawful(score_OI: torch.Tensor, new_OI: torch.Tensor, old_OI: torch.Tensor, group: int, zeros: int) -> None:
    """In each `group` of weights exactly `zeros` are zero, and they have the lowest scores; the others are untouched."""
    gone = new_OI == 0
    assert torch.equal(new_OI, torch.where(gone, 0, old_OI)) and bool((old_OI != 0).all())
    gone_RN, score_RN = gone.reshape(-1, group), score_OI.reshape(-1, group)
    assert bool((gone_RN.sum(1) == zeros).all())
    highest_gone = score_RN.masked_fill(~gone_RN, 0).amax(1)
    assert bool((score_RN.masked_fill(gone_RN, torch.inf).amin(1) >= highest_gone * (1 - NEAR)).all())


def expert_keys(folder: Path) -> set[str]:
    skeleton = Skeleton.of(str(folder))
    return {
        key for index, site in skeleton.sites.items() for path in site.weight_paths()
        for key in skeleton.source_keys(f"{skeleton.layer_name(index)}.{site.block}.{path}")
    }  # fmt: skip


def rows(tensor: torch.Tensor, family: str) -> torch.Tensor:
    """A matrix or stack of them as rows of inputs; gpt_oss keeps them the other way round."""
    turned = tensor.mT if family == "gpt_oss" else tensor
    return turned.reshape(-1, turned.shape[-1])
