"""Loading finished folders: `AutoModelForCausalLM.from_pretrained(DIR)` needs no flag after `import trimoe`; and `trimoe.load`."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from trimoe.auto_classes import NativeLoader
from trimoe.checkpoint.folder import Checkpoint
from trimoe.checkpoint.headers import DTYPES
from trimoe.checkpoint.packed import Packed
from trimoe.errors import UserError
from trimoe.model import transformers5
from trimoe.model.linears import linears
from trimoe.model.moe_block import MoeBlock, tensor_at
from trimoe.model.precision import compute_dtype
from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import first_projection
from trimoe.run import kernels
from trimoe.walk.walk import give_back, usable_device


def load(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    **options: Any,
) -> PreTrainedModel:
    """A finished folder (or any causal MoE model, built-in ones too) as a transformers model in eval mode.

    `dtype` "auto" keeps the checkpoint's. Packed experts run packed, by `backend` (trimoe/run/kernels.py lists them). For other
    checkpoints, `options` go to `from_pretrained`. Raises UserError where the folder is not a model.
    """
    kernels.check_backend(backend)
    checkpoint = Checkpoint.open(folder)
    config = transformers5.load_config(checkpoint.folder)
    dtype = "auto" if dtype == "auto" else _dtype(checkpoint, dtype)
    if transformers5.causal_lm_class(config) is None:
        raise UserError(f"{folder} ({config.model_type}) is not a causal language model that transformers knows.")
    if checkpoint.scheme is not None:
        if options:
            raise UserError(f"{folder} has packed experts, which are not loaded by from_pretrained: it takes no {', '.join(options)}.")
        return load_packed(checkpoint, device=device, dtype=dtype, backend=backend)
    if backend != "auto":
        raise UserError(f"{folder} is not quantised; the backend {backend!r} runs packed experts only.")
    model = NativeLoader.from_pretrained(checkpoint.folder, config=config, dtype=dtype, **options)
    return model.to(torch.device(device)).eval()  # type: ignore[arg-type]


# ---- packed experts


@torch.no_grad()
def load_packed(
    folder: str | os.PathLike[str] | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
) -> PreTrainedModel:
    """A checkpoint with packed experts as a transformers model in eval mode; no more than one expert matrix is ever dense.

    `dtype` is that of everything that is not packed ("auto": config.json's). The model stays on `device`. Beside what any model has:
    `trimoe_backends` counts the packed matrices by backend, `trimoe_expert_bytes` is what those of the experts take in memory, and
    `trimoe_quantized_share` is the share of expert weights held as integers, 1.0. Raises UserError where an expert matrix is not packed.
    """
    kernels.check_backend(backend)
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint.open(folder)
    place, precision = usable_device(str(device)), _dtype(checkpoint, dtype)
    skeleton = Skeleton.of(checkpoint, precision)
    stacks = {index: _stacks(skeleton, index, site) for index, site in skeleton.sites.items()}
    model: Any = skeleton.model
    transformers5.load_into(model, {key: checkpoint.read(key) for key in skeleton.outer_keys}, place, precision)
    for index, keys in enumerate(skeleton.keys_by_layer):
        others = _packed_linears(skeleton, index)
        packed_here = {key for name in stacks.get(index, {}).values() for key in skeleton.source_keys(name)} | set(others.values())
        transformers5.load_into(model, checkpoint.read_together([key for key in keys if key not in packed_here]), place, precision)
        for path, name in stacks.get(index, {}).items():
            _attach(skeleton, skeleton.sites[index], path, name, place, backend)
        for path, key in others.items():
            parent, _, leaf = path.rpartition(".")
            linear: Any = skeleton.layers[index].get_submodule(path)
            linear.weight = nn.Parameter(torch.empty(0, dtype=precision, device=place), requires_grad=False)
            packed = kernels.PackedLinear(linear, _matrix(checkpoint.packed(key), place, backend))
            setattr(skeleton.layers[index].get_submodule(parent), leaf, packed)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(place)
    skeleton.tie()
    give_back()
    transformers5.plain_outputs(model.config, like=skeleton.config)
    return _finished(model, checkpoint, [_experts(skeleton, site) for site in skeleton.sites.values()])


def _experts(skeleton: Skeleton, site: MoeBlock) -> Any:
    return site.experts_of(skeleton.layers[site.layer])


def _dtype(checkpoint: Checkpoint, dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype != "auto":
        return compute_dtype(dtype)
    floats = [DTYPES[info.dtype] for info in checkpoint.stored.values() if DTYPES[info.dtype].is_floating_point]
    return getattr(transformers5.load_config(checkpoint.folder), "dtype", None) or floats[0]


def _stacks(skeleton: Skeleton, index: int, site: MoeBlock) -> dict[str, str]:
    """Path -> full name of the two stacked weights of a layer's experts, each of them packed throughout."""
    where, experts = f"{skeleton.name}, layer {index}", _experts(skeleton, site)
    if site.factored or experts.is_transposed:
        raise UserError(f"{where}: packed experts run only as whole matrices [outputs, inputs], one a key; these are stored otherwise.")
    paths = site.weight_paths()
    names = {path: f"{skeleton.layer_name(index)}.{site.block}.{path}" for path in paths}
    for name in names.values():
        dense = [key for key in skeleton.source_keys(name) if key in skeleton.checkpoint.stored]
        if dense:
            raise UserError(f"{where}: {dense[0]} is not packed as the other experts are ({len(dense)} such); such a mixture is not run.")
    return names


def _packed_linears(skeleton: Skeleton, index: int) -> dict[str, str]:
    """Path -> disk key of a layer's packed matrices outside the experts."""
    stored = skeleton.checkpoint.stored
    return {
        path: key for path in linears(skeleton, index, block=True)
        if (key := skeleton.source_keys(f"{skeleton.layer_name(index)}.{path}.weight")[0]) not in stored
    }  # fmt: skip


def _matrix(packed: Packed, device: torch.device, backend: str) -> kernels.Matrix:
    rows, columns = packed.q_OI.shape
    chosen = kernels.choose(backend, packed.bits, packed.group, (rows, columns), device)
    handle = chosen.pack(Packed(packed.q_OI.to(device), packed.scale_OG.to(device), packed.bits, packed.group))
    return kernels.Matrix(chosen, handle, packed.q_OI.numel())


def _attach(skeleton: Skeleton, site: MoeBlock, path: str, name: str, device: torch.device, backend: str) -> None:
    """Read one stacked weight's matrices and hang them on the experts; the weight itself becomes empty."""
    experts, leaf = _experts(skeleton, site), path.rpartition(".")[2]
    stacked = tensor_at(experts, leaf)
    is_first = stacked is first_projection(experts)
    matrices = []
    for pieces in _pieces(skeleton, name, stacked.shape[0], stacked.shape[1]):
        parts = [skeleton.checkpoint.packed(key) for key, _ in pieces]
        one = parts[0]
        assert all((part.bits, part.group) == (one.bits, one.group) for part in parts), f"{name}: differing schemes in one expert"
        order_O = torch.cat([rows for _, rows in pieces]).argsort()
        q_OI, scale_OG = torch.cat([part.q_OI for part in parts])[order_O], torch.cat([part.scale_OG for part in parts])[order_O]
        assert q_OI.shape == stacked.shape[1:], f"{name}: {tuple(q_OI.shape)} instead of {tuple(stacked.shape[1:])}"
        matrices.append(_matrix(Packed(q_OI, scale_OG, one.bits, one.group), device, backend))
    setattr(experts, leaf, nn.Parameter(torch.empty(0, dtype=skeleton.dtype, device=device), requires_grad=False))
    setattr(experts, "trimoe_first" if is_first else "trimoe_down", matrices)


def _pieces(skeleton: Skeleton, name: str, count: int, rows: int) -> list[list[tuple[str, torch.Tensor]]]:
    """For each expert the disk keys that its matrix is made of, and which of its rows each key holds.

    Found by sending a tensor whose rows are numbered throughout the stack through transformers' own reverse conversion.
    """
    numbers = torch.arange(count * rows, dtype=torch.float64).view(count, rows, 1).expand(count, rows, 2).contiguous()
    disk = transformers5.to_disk_format(skeleton.model, {name: numbers}, skeleton.conversion)
    assert set(disk) == set(skeleton.source_keys(name)), f"{name} cannot be written back under the names it was read from"
    found: list[list[tuple[str, torch.Tensor]]] = [[] for _ in range(count)]
    for key, tensor in disk.items():
        assert tensor.dim() == 2 and bool((tensor[:, :1] == tensor).all()), f"{key} is not rows of one expert"
        number = tensor[:, 0].long()
        expert = int(number[0]) // rows
        assert bool((number // rows == expert).all()), f"{key} holds several experts"
        found[expert].append((key, number % rows))
    return found


def _finished(model: Any, checkpoint: Checkpoint, experts: list[Any]) -> PreTrainedModel:
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"not loaded: {left[:3]}"
    matrices = [matrix for module in experts for matrix in (*module.trimoe_first, *module.trimoe_down)]
    # Stacked weights that are still there run unquantised.
    floats = sum(
        tensor.numel() for module in experts for key, tensor in module.named_parameters(recurse=False) if not key.endswith("_bias")
    )
    integers = sum(matrix.count for matrix in matrices)
    model.trimoe_quantized_share = integers / (integers + floats)
    assert model.trimoe_quantized_share == 1.0
    others = [module.trimoe_matrix for module in model.modules() if isinstance(module, kernels.PackedLinear)]
    model.trimoe_backends = dict(Counter(matrix.backend.name for matrix in (*matrices, *others)))
    model.trimoe_expert_bytes = sum(matrix.nbytes for matrix in matrices)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # transformers would take it for something left to unpack
    model.set_experts_implementation(kernels.NAME)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.save_pretrained = _no_saving
    return model.requires_grad_(False).eval()  # adapters may still be trained on top (see packed_experts)


def _no_saving(*args: Any, **kwargs: Any) -> None:
    raise UserError("A model that runs packed has no dense expert weights to save; copy the folder that it was loaded from.")
