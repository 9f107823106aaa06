"""Every supported family: what is found, what is written, and that it loads in a new process and computes the same."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from forks import Forks
from safetensors.torch import load_file

import trimoe
from trimoe.model.moe_block import keep_experts
from trimoe.model.skeleton import Skeleton
from trimoe.walk.decided import masked
from trimoe.walk.walk import LayerWalk

pytestmark = pytest.mark.xdist_group("new process")  # on one worker, which compresses once
ALL = sorted(families.FAMILIES)
LAYOUTS = ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3", "jamba", "ernie4_5_moe"]  # one of each
COMPRESSED = ["uniform", "uneven", "moe-i2"]  # what other tests need of every family
GROUPED = {"deepseek_v2": 2, "deepseek_v3": 2}
IDS = torch.arange(3, 35).view(2, 16)

RECIPES: dict[str, list[dict[str, Any]]] = {
    "uniform": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "search": "greedy"}}],
    "uneven": [{"expert_drop": {"ratio": 0.45, "counts": "importance", "search": "exhaustive", "receptive_field": {"k": 2, "t": 2}}}],
    "factored": [{"low_rank": {"ratio": 0.3, "rank": "importance"}}],
    "moe-i2": [
        {"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": {"genetic": {"population": 8, "generations": 3}}}},
        {"low_rank": {"ratio": 0.3, "rank": "optimal"}},
    ],
    "merged": [{"low_rank": {"ratio": 0.3, "rank": "uniform", "form": "dense", "whiten": "none"}}],
}

# Loads every folder given, in a process that knows nothing of how they were made, and saves what came out.
IN_NEW_PROCESS = """
import sys, torch, warnings
how, *folders = sys.argv[1:]
from transformers import AutoModelForCausalLM
options = {"trust_remote_code": True} if how == "remote" else {}
if how == "trimoe": import trimoe
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        logits = model.eval()(ids).logits
        tokens = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
        again = model.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder + ".again")
    second = AutoModelForCausalLM.from_pretrained(folder + ".again", dtype=torch.float32, **options).state_dict()
    torch.save({"logits": logits, "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
                "cached": torch.equal(tokens, again), "state": state, "module": type(model).__module__,
                "resaved": second.keys() == state.keys() and all(torch.equal(second[name], state[name]) for name in state)},
               folder + "." + how)
"""

WAYS = [("uniform", "stock"), ("moe-i2", "trimoe"), ("moe-i2", "remote")]


Compressed = Callable[[str, str], trimoe.Result]


@pytest.fixture(scope="session")
def compressed(family_folder: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """A family compressed by a recipe; the same folder every time it is asked for. Tests must not write into it."""
    root = tmp_path_factory.mktemp("compressed")

    @functools.cache
    def get(family: str, recipe: str) -> trimoe.Result:
        steps = {"steps": RECIPES[recipe]}
        out = root / recipe / family
        return trimoe.compress(family_folder(family), steps, out, calibration=[str(text_file)], samples=8, length=32)

    return get


@pytest.fixture(scope="session")
def loaded_elsewhere(
    compressed: Compressed, with_trimoe: Forks, with_transformers: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], tuple[Path, dict[str, Any]]]:
    """(folder, what a new process found in it); all families of a way share one process."""
    root, done = tmp_path_factory.mktemp("elsewhere"), set()

    def get(family: str, recipe: str, how: str) -> tuple[Path, dict[str, Any]]:
        folders = {name: root / recipe / name for name in ALL}
        if (recipe, how) not in done:
            for name, folder in folders.items():
                if not folder.exists():
                    shutil.copytree(compressed(name, recipe).out, folder)
            forks = with_trimoe if how == "trimoe" else with_transformers
            process = forks.run("-c", IN_NEW_PROCESS, how, *folders.values())
            assert process.returncode == 0, process.stderr[-3000:]
            done.add((recipe, how))
        return folders[family], torch.load(f"{folders[family]}.{how}")

    return get


def expected_logits(family: str, folder: Path, result: trimoe.Result) -> torch.Tensor:
    """The original model with the dropped experts masked out of its routers (no trimoe writing or loading involved)."""
    model = families.build(family)
    skeleton = Skeleton.of(str(folder))
    layers = model.get_submodule(skeleton.prefix)
    managers = []
    for index, decision in result.decisions.items():
        site = skeleton.sites[index]
        drop = tuple(sorted(set(range(site.num_experts)) - set(decision.keep)))
        managers.append(masked(layers[index], site, drop))
    for manager in managers:
        manager.__enter__()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ALL)
def test_streamed_equals_in_memory(family: str, family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder(family)))
    walk = LayerWalk(skeleton, [IDS[:1], IDS[1:]])
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            walk.advance(index, layer)
    with walk.head() as head, torch.no_grad():
        streamed = torch.cat([head(hidden, batch) for batch, hidden in enumerate(walk.hidden)])
        truth = families.build(family)(IDS).logits
    torch.testing.assert_close(streamed, truth, atol=2e-5, rtol=1e-4)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters()), "weights stayed behind"


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("recipe", ["uniform", "uneven"])
def test_dropping_equals_masking(family: str, recipe: str, family_folder: Callable[[str], Path], compressed: Compressed) -> None:
    result = compressed(family, recipe)
    groups, experts = GROUPED.get(family, 1), 8 * len(result.decisions)
    gone = round(RECIPES[recipe][0]["expert_drop"]["ratio"] * experts / groups) * groups
    assert sum(len(d.keep) for d in result.decisions.values()) == experts - gone
    model = trimoe.load(result.out)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected_logits(family, family_folder(family), result), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "recipe"), [(family, recipe) for family in ALL for recipe in (RECIPES if family in LAYOUTS else COMPRESSED)]
)
def test_final_plan_is_the_disk(family: str, recipe: str, family_folder: Callable[[str], Path], compressed: Compressed) -> None:
    before = trimoe.plan(str(family_folder(family)), {"steps": RECIPES[recipe]}, samples=8, length=32)
    result = compressed(family, recipe)
    out = result.out
    on_disk = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert result.plan.bytes == on_disk == json.loads((out / "trimoe.json").read_text())["plan"]["bytes"]
    assert before.after.least_bytes <= on_disk <= before.after.file_bytes
    if before.bytes is not None:
        assert before.bytes == on_disk
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert set(index["weight_map"]) == set(tensors)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == index["metadata"]["total_size"]
    assert not (out / ".trimoe").exists() and not list(out.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(("recipe", "how"), WAYS)
def test_loads_in_a_new_process(family: str, recipe: str, how: str, loaded_elsewhere: Callable[..., tuple[Path, dict[str, Any]]]) -> None:
    folder, loaded = loaded_elsewhere(family, recipe, how)
    assert loaded["missing"] == loaded["unexpected"] == []
    assert loaded["cached"], "cached and uncached generation differ"
    assert loaded["resaved"], "saved by transformers and loaded again, tensors differ"
    here = trimoe.load(folder, dtype=torch.float32)
    native = "moe_compression" in json.loads((folder / "config.json").read_text())
    assert loaded["module"].startswith("transformers.") != (native and how != "stock") or loaded["module"].startswith(
        "transformers_modules"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded["logits"], here(IDS).logits, atol=2e-5, rtol=1e-4)
    mine = here.state_dict()
    assert loaded["state"].keys() == mine.keys()
    assert all(torch.equal(loaded["state"][name], mine[name]) for name in mine)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "jamba"])
@pytest.mark.parametrize("recipe", ["uneven", "factored"])
def test_stock_transformers_refuses_native(family: str, recipe: str, compressed: Compressed) -> None:
    """The guard: without our loader the checkpoint must not load with random experts."""
    from trimoe.modeling_trimoe import stock_class

    result = compressed(family, recipe)
    assert result.plan.form == "native"
    config = families.config_of(family)
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        stock_class(config).from_pretrained(result.out)


@pytest.mark.parametrize("family", ALL)
def test_kept_experts_are_copied_bit_for_bit(family: str, family_folder: Callable[[str], Path], compressed: Compressed) -> None:
    """Against transformers' own view of both checkpoints: every surviving expert and router row equals its source."""
    result = compressed(family, "uniform")
    small, whole = trimoe.load(result.out), families.build(family)
    skeleton = Skeleton.of(str(family_folder(family)))
    for index, decision in result.decisions.items():
        site, layers = skeleton.sites[index], whole.get_submodule(skeleton.prefix)
        keep_experts(site.block_of(layers[index]), site, decision.keep)
    expected = whole.state_dict()
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", ALL)
def test_dropping_nothing_changes_nothing(family: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    source, out = family_folder(family), tmp_path / "out"
    steps = {"steps": [{"expert_drop": {"ratio": 0.0, "counts": "uniform"}}]}
    trimoe.compress(source, steps, out, calibration=[str(text_file)], samples=2, length=32)
    before = {k: t for p in source.glob("*.safetensors") for k, t in load_file(p).items()}
    after = {k: t for p in out.glob("*.safetensors") for k, t in load_file(p).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
