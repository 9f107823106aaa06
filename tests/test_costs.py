"""What a token costs on paper, against what torch counts and what a real cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import trimoe
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.plan.token_cost import caches, context_of, head_matrix, of_layers

Family = Callable[[str], Path]
ATTENDING = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "phimoe", "ernie4_5_moe", "hunyuan_v1_moe")


def tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor reachable from a cache, once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner, seen)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner, seen)
    elif hasattr(value, "__dict__"):
        for inner in vars(value).values():
            yield from tensors(inner, seen)


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_cache_is_what_a_real_one_holds(family: str, tmp_path: Path) -> None:
    changes = {"sliding_window": 8} if family in ("mixtral", "gpt_oss") else {}
    model = families.save(family, tmp_path, **changes)
    found = caches(Skeleton.of(str(tmp_path)))
    assert found is not None and len(found) == 3
    for tokens in (5, 20):
        kept = model(input_ids=torch.randint(3, 90, (1, tokens)), use_cache=True).past_key_values
        real = sum(tensor.nbytes for tensor in tensors(kept, set()))
        assert sum(cache.nbytes(tokens) for cache in found) == real, (tokens, found)


def test_kinds_of_cache(family_folder: Family) -> None:
    kinds = {
        family: [cache.kind for cache in caches(Skeleton.of(str(family_folder(family)))) or ()]
        for family in ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "minimax", "jamba")
    }
    hybrid = ["state", "all tokens", "state"]
    assert kinds == {
        "mixtral": ["all tokens"] * 3, "deepseek_v3": ["latent"] * 3, "gpt_oss": ["window", "all tokens", "window"], "qwen3_next": hybrid,
        "minimax": hybrid, "jamba": hybrid,
    }  # fmt: skip


@pytest.mark.parametrize("family", ATTENDING)
@torch.no_grad()
def test_flops_are_what_torch_counts_for_one_more_token(family: str, family_folder: Family) -> None:
    skeleton = Skeleton.of(str(family_folder(family)))
    context = context_of(skeleton)
    model = families.build(family)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    kept = model(input_ids=torch.randint(3, 90, (1, context - 1)), use_cache=True).past_key_values
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[5]]), past_key_values=kept, use_cache=True)
    layers = of_layers(skeleton, Layout(skeleton, unchanged(skeleton.sites)))
    paper = 2 * head_matrix(skeleton) + sum(layer.flops for layer in layers)
    rotary = 2 * 4  # the rope table is a matrix product of a position with the frequencies
    assert abs(paper - counter.get_total_flops()) <= 16 * rotary, (paper, counter.get_total_flops())


def test_flops_follow_the_recipe(family_folder: Family) -> None:
    """Low rank multiplies with fewer parameters, dropped layers with none; dropping experts leaves top-k as it was but for the router."""
    folder = str(family_folder("mixtral"))
    skeleton = Skeleton.of(folder)
    site = skeleton.sites[0]
    fewer = trimoe.plan(folder, {"steps": [{"expert_drop": {"count": 2, "counts": "uniform"}}]})
    assert fewer.before.flops - fewer.after.flops == 3 * 2 * 2 * site.hidden  # two router rows in three layers
    assert fewer.before.active - fewer.after.active == 3 * 2 * site.hidden
    shorter = trimoe.plan(folder, {"steps": [{"block_drop": {"count": 1}}]})
    assert shorter.after.flops == shorter.before.flops - fewer.layers[0]["before"]["flops"]
    assert shorter.after.cache_bytes == shorter.before.cache_bytes // 3 * 2
    low = trimoe.plan(folder, {"steps": [{"low_rank": {"ratio": 0.1, "rank": "uniform"}}]})
    assert low.after.flops < low.before.flops and low.after.active < low.before.active
    packed = trimoe.plan(folder, {"steps": [{"quantize": {"bits": 4, "group": 8, "method": "round"}}]})
    assert (packed.after.flops, packed.after.parameters) == (packed.before.flops, packed.before.parameters)


def test_rows_add_up(family_folder: Family) -> None:
    """Layers, dense layers and what lies outside are all there is."""
    for family in ("deepseek_v2", "jamba", "gpt_oss"):
        made = trimoe.plan(str(family_folder(family)), {"steps": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "weights"}}]})
        skeleton = Skeleton.of(str(family_folder(family)))
        outside = sum(skeleton.checkpoint.tensors[key].nbytes for key in skeleton.outer_keys)
        parts = sum(row["before"]["bytes"] for row in made.layers) + made.dense_layers["bytes"][0]
        assert outside + parts == skeleton.checkpoint.nbytes - sum(skeleton.checkpoint.tensors[key].nbytes for key in skeleton.ignored_keys)
        assert made.before.flops == 2 * head_matrix(skeleton) + made.dense_layers["flops"][0] + sum(
            row["before"]["flops"] for row in made.layers
        )
        kept = caches(skeleton)
        assert kept is not None and made.before.cache_bytes == sum(cache.nbytes(1000) for cache in kept)  # what tables call cache/1K
