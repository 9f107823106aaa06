"""Which engines load a result, why the others do not, and over how many devices its heads and experts divide.

Only transformers is run by our tests. What is said of the others is what their lists of architectures and their loaders' rules say: vLLM
(vllm/model_executor/models/registry.py), SGLang (python/sglang/srt/models), llama.cpp (conversion/__init__.py), read in 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trimoe import depth
from trimoe.errors import UserError
from trimoe.layout import Layout
from trimoe.methods.method import Decisions
from trimoe.recipe import Recipe
from trimoe.skeleton import Skeleton

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")
COMMON = frozenset({
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "phimoe", "granitemoe",
    "ernie4_5_moe", "jamba", "hunyuan_v1_moe", "minimax_m2",
})  # fmt: skip
KNOWS = {"vllm": COMMON | {"minimax", "dots1", "flex_olmo", "lfm2_moe"}, "sglang": COMMON, "llama.cpp": COMMON | {"dots1", "lfm2_moe"}}
MOST = 64  # devices
HEADS = ("num_attention_heads", "linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "mamba_n_heads")  # each must divide
GROUPS = ("n_groups", "mamba_n_groups")  # of a mamba layer with heads: divide, or there is one, which every device has


@dataclass(frozen=True)
class Loading:
    """Engine -> "yes ...", "no (why)" or "not known ...", and the numbers of devices that divide the model where engines other than
    transformers load it."""

    loads_in: dict[str, str]
    tensor_parallel: list[int]
    expert_parallel: list[int]


def loading(skeleton: Skeleton, layout: Layout, *, native: bool) -> Loading:
    """`native`: the result has, or will have once all is decided, a form that stock code cannot express."""
    decisions, kind = layout.decisions, skeleton.config.model_type
    packed = skeleton.checkpoint.scheme is not None or any(decision.bits for decision in decisions.values())
    loads = {}
    for engine in ENGINES[1:]:
        if native:
            loads[engine] = f"no ({why_native(skeleton, decisions)})"
        elif packed and engine == "llama.cpp":
            loads[engine] = "no (it does not read compressed-tensors)"
        elif by_number(skeleton, decisions):
            loads[engine] = "not known: it may take a layer's kind from its number"
        elif kind not in KNOWS[engine]:
            loads[engine] = f"not known: {kind} is not in its list of 2026"
        else:
            loads[engine] = "made for it, not tried (compressed-tensors)" if packed else f"yes, as {kind} (not tried)"
    own = ["import trimoe or trust_remote_code=True"] if native else []
    own += ["compressed-tensors installed"] if packed else []
    loads = {"transformers": "yes" + (f", with {' and '.join(own)}" if own else ""), **loads}
    return Loading(loads, [] if native else tensor_parallel(skeleton, decisions), [] if native else expert_parallel(skeleton, decisions))


def why_native(skeleton: Skeleton, decisions: Decisions) -> str:
    """What of the result stock code cannot express."""
    left = [decisions[index] for index in skeleton.sites if decisions[index].gone is None]
    if any(decision.bitmask for decision in decisions.values()):
        return "zeros are left out of the files"
    if any(decision.factored for decision in left) or any(site.factored for site in skeleton.sites.values()):
        return "experts are factored"
    if any(decision.gone == "moe" for decision in decisions.values()):
        return "MoE sub-layers are dropped, and this family has no dense layers to stand in"
    return "expert counts differ from layer to layer"


def tensor_parallel(skeleton: Skeleton, decisions: Decisions) -> list[int]:
    """Over how many devices every layer's matrices divide evenly: attention heads, key and value heads (or these are repeated evenly), mamba
    channels, heads and groups, expert and MLP widths, and whole groups of them where weights are integers."""
    text = skeleton.config.get_text_config()
    heads = [value for name in HEADS if isinstance(value := getattr(text, name, None), int) and value]
    heads += _mamba_widths(text)
    shared = 0 if getattr(text, "kv_lora_rank", None) else getattr(text, "num_key_value_heads", None) or 0  # a latent cache is not split
    group = next((decision.group for decision in decisions.values() if decision.group), 1)
    widths = {site.width // group if site.width % group == 0 else 1 for i, site in skeleton.sites.items() if decisions[i].gone is None}
    inner = _mlp_widths(skeleton)
    return [
        ways for ways in range(1, MOST + 1)
        if all(value % ways == 0 for value in (*heads, *widths, *inner)) and (not shared or shared % ways == 0 or ways % shared == 0)
    ]  # fmt: skip


def _mamba_widths(text: Any) -> list[int]:
    """Inner channels and groups of a family's mamba layers: each must divide."""
    expand = getattr(text, "mamba_expand", None) or getattr(text, "expand", None)
    inner = [int(expand * text.hidden_size)] if isinstance(expand, (int, float)) else []
    if not any(getattr(text, name, None) for name in ("mamba_num_heads", "mamba_n_heads")):
        return inner
    return inner + [value for name in GROUPS if isinstance(value := getattr(text, name, None), int) and value > 1]


def _mlp_widths(skeleton: Skeleton) -> set[int]:
    """Inner widths of dense MLPs and shared experts."""
    return {
        module.in_features for layer in skeleton.layers for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("down_proj", "w2"))
    }  # fmt: skip


def expert_parallel(skeleton: Skeleton, decisions: Decisions) -> list[int]:
    """Over how many devices the experts of every layer divide evenly."""
    counts = {len(decisions[index].keep) for index in skeleton.sites if decisions[index].gone is None}
    return [ways for ways in range(1, MOST + 1) if counts and all(count % ways == 0 for count in counts)]


def by_number(skeleton: Skeleton, decisions: Decisions) -> bool:
    """Whether the result has layers of several kinds, or dense ones of zeros, in other places than its family has them: transformers
    reads that from config.json, other engines may go by the layer's number."""
    gone = [decision.gone for decision in decisions.values() if decision.gone]
    kinds = set(depth.explicit(skeleton, {}).get("layer_types") or ())
    return "moe" in gone or ("block" in gone and len(kinds) > 1)


def check_target(recipe: Recipe, native: bool, skeleton: Skeleton, decisions: Decisions) -> None:
    """Raises UserError if what the recipe says must load the result cannot."""
    if recipe.target != "transformers" and by_number(skeleton, decisions):
        raise UserError(
            f"The recipe's target is {recipe.target}, which may take a layer's kind from its number, and the dropped layers change the "
            "numbers; use expert_drop, or target: transformers."
        )
    if recipe.target not in ("transformers", "vllm") and any(decision.bits for decision in decisions.values()):
        raise UserError(
            f"The recipe's target is {recipe.target}, which does not read compressed-tensors; use target: vllm or transformers."
        )
    if native and recipe.target != "transformers":
        raise UserError(
            f"The recipe's target is {recipe.target}, but different expert counts per layer, factored experts, zeros left out and, in this "
            "family, dropped MoE sub-layers load in transformers only; use counts: uniform with a ratio that removes equally many everywhere, "
            "form: dense and block_drop, or target: transformers."
        )


def sizes(ways: list[int]) -> str:
    """Numbers of devices for people."""
    return ", ".join(map(str, ways)) if ways else "none"


def as_json(found: Loading) -> dict[str, Any]:
    return {"tensor": found.tensor_parallel, "expert": found.expert_parallel}
