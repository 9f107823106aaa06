"""Everything trimoe uses of transformers' internals, in one place. Written for transformers 5.21 to 5.23."""

from __future__ import annotations

import copy
import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from trimoe import modeling_trimoe
from trimoe.checkpoint.headers import DTYPES, TensorInfo
from trimoe.errors import UserError, first_line, stop_if_told

# The names under which configurations keep the number of routed experts and of experts per token.
COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
FILLED = 1 << 20  # bytes of zeros that are filled at once
MAX_BUFFER = 64 << 20  # bytes of one table; those of positions have kilobytes, the largest known (a decay of minimax's) 17 MB a layer
OUTPUTS = {"output_router_logits": False, "output_hidden_states": False, "output_attentions": False, "return_dict": True}
# Names of tensors of multi-token prediction, of buffers that old versions saved, and of fields that count prediction layers.
PREDICTION = r"(^|[._])(mtp|nextn)([._\d]|$)|(^|\.)(mtp\w*|eh_proj|enorm|hnorm|shared_head)\."
BUFFERS = r"rotary_emb\.((original_)?inv_freq|cos_cached|sin_cached)$|(^|\.)(position_ids|masked_bias)$"
PREDICTION_FIELD = re.compile(r"mtp|nextn|multi_token_pred")
COUNTING_FIELD = re.compile(r"num|count|layers|modules|depth")
LAST_NUMBER = re.compile(r"(.*\.\d+\..*\.)\d+(\.\D.*)")  # in a key with another number before it, a layer's
READ_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"  # where transformers is told not to
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration object; code inside the folder is never run."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise types of their own
        stop_if_told(error)
        raise UserError(f"transformers {transformers.__version__} cannot read {folder / 'config.json'}: {first_line(error)}") from None
    for part in (config, config.get_text_config()):  # names with a slash are hub repositories whose code would be fetched and run
        if any("/" in str(getattr(part, field, "")) for field in ("_attn_implementation", "_experts_implementation")):
            raise UserError(f"{folder / 'config.json'} asks for an attention or experts kernel from the hub; remove that field.")
        if getattr(part, "is_heterogeneous", False):  # such a configuration has no value of its own for what differs
            raise UserError(
                f"{folder / 'config.json'} describes layers that differ in {', '.join(sorted(part._heterogeneity_spec.per_layer_attributes))} "
                f"({part.model_type}); models with settings of their own in each layer are not supported yet."
            )
    return config


def plain_outputs(config: PreTrainedConfig, like: PreTrainedConfig | None = None) -> None:
    """Switch off, in place, what trainers leave switched on in config.json: a forward pass then gives logits and nothing beside them. With
    `like` the switches stand as they do there."""
    parts = [(config, like), (config.get_text_config(), None if like is None else like.get_text_config())]
    for part, same in parts:
        for name, value in OUTPUTS.items():
            if hasattr(part, name):
                setattr(part, name, value if same is None else getattr(same, name))


def config_from(values: Mapping[str, Any], like: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the class of `like` from JSON values."""
    return type(like).from_dict(copy.deepcopy(dict(values)))


def canonical(config: PreTrainedConfig, names: tuple[str, ...]) -> str | None:
    """The field of this configuration class that really holds one of `names`."""
    for name in names:
        real = type(config).attribute_map.get(name, name)
        if isinstance(getattr(config, real, None), int):
            return real
    return None


def spellings(config: PreTrainedConfig, field: str) -> list[str]:
    """`field` and every alias of it."""
    return [field, *(alias for alias, real in type(config).attribute_map.items() if real == field)]


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    mapping = AutoModelForCausalLM._model_mapping
    return modeling_trimoe.stock_class(config) if type(config) in mapping else None


class _NothingLarge(TorchFunctionMode):
    """Tensors larger than any buffer may be are made on the meta device: accelerate lets the constructor allocate a parameter before it
    moves it there, and one layer's stacked experts may be larger than the machine. Many zeros, which some routers begin with, are fresh pages,
    which the system fills when something reads them: nothing does."""

    MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function in self.MAKERS and options.get("device") is None:
            hollow = function(*args, **{**options, "device": "meta"})
            size = hollow.numel() * hollow.element_size()
            if size > MAX_BUFFER:
                return hollow
            if function is torch.zeros and size > FILLED and options.keys() <= {"dtype", "device"}:
                return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).view(hollow.dtype).view(hollow.shape)
        return function(*args, **options)


def other_senses(config: PreTrainedConfig) -> list[str]:
    """The parts of a configuration that describe something else than a language model: towers for images, sound or video."""
    if config.get_text_config() is config:
        return []
    return sorted(name for name in type(config).sub_configs if getattr(config, name, None) is not None and not name.startswith("text"))


def not_needed(name: str, predicting: tuple[str, ...]) -> bool:
    """Whether a tensor that the architecture has no place for may be left out: multi-token prediction (`predicting`: beginnings of the
    names of its layers), and buffers that are computed from the configuration."""
    return bool(re.search(PREDICTION, name) or re.search(BUFFERS, name)) or name.startswith(predicting)


def predicted(config: Mapping[str, Any]) -> int:
    """How many multi-token prediction layers a configuration counts, however it spells them."""
    counts = [
        value for name, value in config.items()
        if isinstance(name, str) and PREDICTION_FIELD.search(name) and COUNTING_FIELD.search(name) and type(value) is int and 0 < value < 100
    ]  # fmt: skip
    nested = [predicted(value) for value in config.values() if isinstance(value, dict)]
    return max((*counts, *nested), default=0)


def without_prediction(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (JSON) that counts no multi-token prediction layers, in every spelling and part of it."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        counts = PREDICTION_FIELD.search(name) is not None
        if isinstance(value, dict) and not counts:
            value = without_prediction(value)
        elif counts and type(value) is int and COUNTING_FIELD.search(name):
            value = 0
        elif counts and value is True:
            value = False
        elif counts and isinstance(value, list):
            value = []
        out[name] = value
    return out


def build_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers real (rope tables and the like). Honours `moe_compression`."""
    with init_empty_weights(include_buffers=False), _NothingLarge():
        model = _built(config, dtype)
    _fill_buffers(model, model)
    return model


def build_bare(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its buffers on the meta device, too; UserError where they would be too large for `build_meta`."""
    with torch.device("meta"):
        model = _built(config, dtype)
    size = max((buffer.numel() * buffer.element_size() for buffer in model.buffers()), default=0)
    if size > MAX_BUFFER:
        raise UserError(f"config.json describes a {config.model_type} with a table of {size:,} bytes beside its weights; it is damaged.")
    return model


def _built(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    stock = modeling_trimoe.stock_class(config)
    wanted = modeling_trimoe.native_class(stock) if getattr(config, modeling_trimoe.KEY, None) else stock
    with no_init_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = copy.deepcopy(config)
        plain_outputs(own)
        model = wanted._from_config(own, dtype=dtype).eval()
    model.tie_weights()
    return model


@torch.no_grad()
def _fill_buffers(module: nn.Module, owner: PreTrainedModel) -> None:
    """Initial values where there is a buffer to hold them: drawing random numbers for meta parameters is half the time of building."""
    for child in module.children():
        _fill_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    if any(buffer is not None for buffer in module._buffers.values()):
        owner._init_weights(module)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(dotted name, list) of the decoder layers: the longest module list whose members are marked as not to be split."""
    marked = set(model._no_split_modules or ())
    lists = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(layer).__name__ in marked for layer in module)
    ]  # fmt: skip
    if not lists:
        raise UserError(f"No list of decoder layers was found in {type(model).__name__}.")
    return max(lists, key=lambda pair: len(pair[1]))


def is_decorated(module: nn.Module) -> bool:
    """Whether the module is dispatched through transformers' experts interface and describes its own layout."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed")) and hasattr(module, "_apply_gate")


@dataclass
class Conversion:
    """How this checkpoint's keys map to this model's parameters, both ways, as found by a weightless trial load."""

    used: list[Any]
    source_of: dict[str, list[str]]  # parameter -> checkpoint keys that make it
    stacked: dict[
        str, list[list[str]]
    ]  # of these, where it is experts' matrices [E, O, I]: keys of all experts, for each part of the O rows
    missing: set[str]
    unexpected: set[str]
    mismatched: list[Any]


def untie(model: PreTrainedModel, name: str) -> None:
    """Give a tied parameter a tensor of its own again."""
    model.all_tied_weights_keys.pop(name)
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(torch.empty_like(getattr(owner, leaf), device="meta"), requires_grad=False))


def share(model: PreTrainedModel, name: str, source: str) -> None:
    """Let the parameter `name` be that of `source`."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, model.get_parameter(source))


def trial_load(model: PreTrainedModel, tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> Conversion:
    """Load `tensors` (headers: meta tensors stand for them) into a bare model, not to be used after that: every name and shape is checked, no
    byte is read. Experts' matrices that are stacked, and what is one tensor of the right shape, are checked here and spared transformers, which
    makes a converter or a pattern for each key."""
    used, source_of, stacked, plain = _sources(model, tensors, dtype)
    spared = {key for parts in stacked.values() for part in parts for key in part} | {source_of[name][0] for name in plain}
    meta = {key: torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta") for key, info in tensors.items() if key not in spared}
    info = _load(model, meta, torch.device("meta"), dtype)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignorable = model._keys_to_ignore_on_load_unexpected or ()
    missing = {key for key in info.missing_keys if key not in tied and key not in stacked and key not in plain}
    if info.conversion_errors:
        told = str(next(iter(info.conversion_errors.values()))).strip().splitlines() or ["no reason given"]  # a traceback: its end says why
        raise UserError(f"The checkpoint's tensors do not fit together: {' '.join(told[-1].split())[:300]}")
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for key in (key for name, keys in source_of.items() if name in floating for key in keys):
        if not DTYPES[tensors[key].dtype].is_floating_point:
            raise UserError(
                f"The tensor {key!r} is stored as {str(DTYPES[tensors[key].dtype]).removeprefix('torch.')}; weights are floating-point numbers."
            )
    unexpected = {key for key in info.unexpected_keys if not any(re.search(pattern, key) for pattern in ignorable)}
    return Conversion(used, source_of, stacked, missing, unexpected, sorted(info.mismatched_keys, key=str))


def _sources(
    model: PreTrainedModel, tensors: Mapping[str, TensorInfo], dtype: torch.dtype
) -> tuple[list[Any], dict[str, list[str]], dict[str, list[list[str]]], set[str]]:
    """The conversions that any key needs; parameter -> keys; of experts' stacked matrices the keys in their order; and the parameters that are
    one key's tensor as it lies there."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found: dict[str, list[str]] = {}
    parts: dict[str, dict[str, list[str]]] = {}

    def renamed(key: str) -> tuple[str, str]:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        return name, pattern or ""

    for key, (name, pattern) in _renamed(tensors, renamed):
        found.setdefault(name, []).append(key)
        parts.setdefault(name, {}).setdefault(pattern, []).append(key)
    other = {word for pattern in model._get_dtype_plan(dtype) for word in pattern.split("*") if word}  # kept in another dtype
    stacked, parameters = {}, dict(model.named_parameters())  # factored experts have guards, buffers under stacked names
    for name, by_pattern in parts.items():
        made = next((one for one in converters if _stacks(one) and set(one.source_patterns) == by_pattern.keys()), None)
        if made is not None and name in parameters and not any(word in name for word in other):
            ordered = [sorted(by_pattern[pattern], key=_numbers) for pattern in made.source_patterns]
            if _fits([[tensors[key].shape for key in part] for part in ordered], tuple(parameters[name].shape)):
                stacked[name] = ordered
    plain = {
        name for name, by_pattern in parts.items()
        if name in parameters and by_pattern.keys() == {""} and len(found[name]) == 1 and tensors[found[name][0]].shape == parameters[name].shape
    }  # fmt: skip
    return [entry for entry in mapping if entry.was_used()], found, stacked, plain


def _renamed(keys: Iterable[str], rename: Callable[[str], tuple[str, str]]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each key with what `rename` makes of it. Keys that differ in their last number alone, an expert's, are one parameter's where the first two
    of them are, and the others are not asked about: no conversion goes by which expert it is."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    merged: dict[tuple[str, str], tuple[str, str] | None] = {}
    for key in keys:
        if (at := LAST_NUMBER.fullmatch(key)) is None:
            yield key, rename(key)
            continue
        around = at.groups()
        answer = merged.get(around)
        if answer is None:
            answer = rename(key)
            if around not in first:
                first[around] = answer
            elif around not in merged:
                merged[around] = answer if answer == first[around] else None
        yield key, answer


def _stacks(converter: WeightConverter) -> bool:
    """Whether it does nothing but stack matrices along a new first axis, and put several such stacks behind each other along the next."""
    first, *rest = converter.operations
    along = [type(first) is MergeModulelist and first.dim == 0, *(type(one) is Concatenate and one.dim == 1 for one in rest)]
    return all(along) and len(rest) == min(1, len(converter.source_patterns) - 1) and len(converter.target_patterns) == 1


def _fits(parts: list[list[tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    same = all(len(part) == shape[0] and len(set(part)) == 1 and part[0] == (shape[1] // len(parts), *shape[2:]) for part in parts)
    return len(shape) > 1 and shape[1] % len(parts) == 0 and same


def _numbers(key: str) -> list[int]:
    return [int(word) for word in key.split(".") if word.isdigit()]


def _load(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype):
    config = LoadStateDictConfig(
        device_map={"": device}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=get_model_conversion_mapping(model)
    )
    with _quiet_progress():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    return info


def load_into(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Put checkpoint tensors into the model's parameters by transformers' own renames and fusions."""
    info = _load(model, tensors, device, dtype)
    assert not info.unexpected_keys and not info.mismatched_keys and not info.conversion_errors, info


def stack_into(
    model: PreTrainedModel, name: str, parts: list[list[str]], read: Callable[[str, torch.Tensor], None], device: torch.device
) -> None:
    """What `load_into` makes of the same keys where a parameter is experts' matrices (`Conversion.stacked`), each read by `read` (key, where
    it goes) straight to its place: nothing is in memory twice, and no memory is touched that is given back at once."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, attribute)
    stack = torch.empty(old.shape, dtype=old.dtype, device=device)
    for expert, keys in enumerate(zip(*parts, strict=True)):
        rows = stack[expert].split(old.shape[1] // len(parts))
        for key, place in zip(keys, rows, strict=True):
            read(key, place)
    setattr(owner, attribute, nn.Parameter(stack, requires_grad=False))


def read_parameter(model: PreTrainedModel, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One parameter in float32, made of the checkpoint tensors that are its sources; the model, on the meta device, stays so."""
    path, _, attribute = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    before = getattr(owner, attribute)
    load_into(model, tensors, torch.device("cpu"), torch.float32)
    found = getattr(owner, attribute).detach().float()
    setattr(owner, attribute, before)
    return found


def to_disk_format(model: PreTrainedModel, state: Mapping[str, torch.Tensor], conversion: Conversion) -> dict[str, torch.Tensor]:
    """Module-format tensors (full names) in the key format that the checkpoint was found in."""
    model._weight_conversions = list(conversion.used)
    return revert_weight_conversion(model, dict(state))


@contextmanager
def _quiet_progress() -> Iterator[None]:
    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


@contextmanager
def read_one_by_one() -> Iterator[None]:
    """Let from_pretrained read a tensor when its turn comes: threads that read ahead hold up to a second model at its peak. (transformers
    takes this from the environment only, which is as it was afterwards.)"""
    before = os.environ.get(READ_AHEAD)
    os.environ[READ_AHEAD] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[READ_AHEAD]
        else:
            os.environ[READ_AHEAD] = before


def register_experts(name: str, function: Callable[..., torch.Tensor]) -> None:
    ALL_EXPERTS_FUNCTIONS.register(name, function)


@contextmanager
def experts_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Route every decorated experts module of `model` through the registered function `name`."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if is_decorated(m)}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation_internal = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
