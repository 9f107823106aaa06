"""Memory that there is, and work that would take more: said by plan, refused by everything that would begin it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import UNIFORM, Line, recipe_file

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.plan import limits, memory, recovery_memory
from trimoe.recipe.recover import parsed
from trimoe.text.documents import START
from trimoe.text.spec import CalibrationSpec
from trimoe.walk.attention_mask import _tensors
from trimoe.walk.walk import LayerWalk

Family = Callable[[str], Path]
TRAINED = {**UNIFORM, "recover": {"method": "lora", "samples": 8, "length": 32, "steps": 1, "batch": 2}}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with less memory than imports take."""
    monkeypatch.setattr(limits, "host", lambda: 200 << 20)
    return 200 << 20


@pytest.mark.parametrize("recipe", [UNIFORM, TRAINED], ids=["compress", "recover"])
def test_plan_says_it_and_compress_refuses(
    recipe: dict[str, Any], little: int, line: Line, family_folder: Family, text_file: Path, tmp_path: Path
) -> None:
    source, out = family_folder("mixtral"), tmp_path / "out"
    given = ["-r", recipe_file(tmp_path, recipe), "-c", text_file, "--samples", 4, "--length", 32]
    said = json.loads(line.run("plan", source, *given, "--json")[1])["warnings"]
    (words,) = [words for words in said if "--any-memory" in words]
    assert "this machine has 200.00 MiB" in words and words.startswith("the ")
    line.refused("this machine has 200.00 MiB", "compress", source, *given, "-o", out, "-q")
    assert not out.exists()
    code, _, err = line.run("compress", source, *given, "-o", out, "-q", "--any-memory")
    assert code == 0, err
    assert "this machine has" not in (out / "trimoe.json").read_text(), "what is recorded is the same on every machine"
    line.refused("take --dtype bfloat16; or begin all the same", "eval", out, "--text", text_file, "-q")
    trained = tmp_path / "trained"
    options = ["--data", text_file, "--samples", 4, "--length", 16, "--steps", 1, "-q"]
    line.refused("dtype: bfloat16", "recover", out, "--method", "lora", "-o", trained, *options)
    assert not trained.exists()


def test_sweep_and_stats_refuse_as_well(little: int, line: Line, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    source, given = family_folder("mixtral"), ["-c", text_file, "--samples", 4, "--length", 32, "-q"]
    line.refused("this machine has 200.00 MiB", "sweep", source, "-r", recipe_file(tmp_path), "-o", tmp_path / "sweep", *given)
    line.refused("The statistics stage", "stats", source, "--out", tmp_path / "stats", *given)
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "stats").exists()


def test_enough_memory_says_nothing(monkeypatch: pytest.MonkeyPatch, family_folder: Family) -> None:
    made = trimoe.plan(str(family_folder("mixtral")), UNIFORM)
    monkeypatch.setattr(limits, "host", lambda: made.peak_memory)
    assert not [words for words in trimoe.plan(str(family_folder("mixtral")), UNIFORM).warnings if "memory" in words]
    monkeypatch.setattr(limits, "host", lambda: made.peak_memory - 1)
    assert [words for words in trimoe.plan(str(family_folder("mixtral")), UNIFORM).warnings if "memory" in words]


def test_host_and_device_are_compared_each_with_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "host", lambda: 10 << 30)
    monkeypatch.setattr(limits, "device", lambda name: 4 << 30 if name == "cuda:1" else None)
    held = memory.PeakMemory({"statistics": 6 << 30, "writing": 7 << 30}, {"statistics": 5 << 30, "writing": 1 << 30})
    (words,) = held.short("cuda:1")
    assert words.startswith("the statistics stage takes up to 5.00 GiB of memory, the device cuda:1 has 4.00 GiB")
    assert not held.short("cpu") and not memory.PeakMemory({"writing": 10 << 30}, {}).short("cpu")
    both = memory.PeakMemory({"writing": 11 << 30}, {"recovery": 5 << 30})
    assert ["this machine" in words for words in both.short("cuda:1")] == [True, False]


GROUPS = [
    ("0::/a/b\n", {"memory.max": "max"}, {"a/memory.max": "3000", "a/memory.swap.max": "500"}, 3500),
    ("0::/a/b\n", {}, {"a/b/memory.max": "2000", "a/b/memory.swap.max": "max", "a/memory.max": "3000"}, 3000),
    ("0::/\n", {"memory.max": "4000"}, {}, 4000),
    ("0::/a\n", {}, {"a/memory.max": "max"}, 9000),
    ("5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n", {}, {"memory/x/memory.limit_in_bytes": "2500"}, 2500),
    ("4:memory:/x\n", {}, {"memory/x/memory.limit_in_bytes": "9223372036854771712"}, 9000),
    ("4:memory:/docker/y\n", {}, {"memory/memory.limit_in_bytes": "2600"}, 2600),  # the group as a container sees it
]


@pytest.mark.parametrize(("lines", "top", "files", "expected"), GROUPS)
def test_control_groups(
    lines: str, top: dict[str, str], files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {**top, **files}.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text(lines)
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(limits, "OWN", tmp_path / "cgroup")
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: SimpleNamespace(total=8000))
    monkeypatch.setattr(limits.psutil, "swap_memory", lambda: SimpleNamespace(total=1000))
    assert limits.host() == expected


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_that_keep_documents_apart_are_planned(family: str, dtype: torch.dtype, family_folder: Family) -> None:
    """One a batch and kind of attention, true and false or numbers, for as long as the walk lasts."""
    skeleton = Skeleton.of(str(family_folder(family)), dtype)
    batches = [torch.randint(3, 90, (2, 24)) for _ in range(2)]
    for number, batch in enumerate(batches):
        batch[:, [0, 9 + number]] += START
    walk = LayerWalk(skeleton, batches)
    masks = {one.data_ptr(): one.nbytes for calls in walk.calls for call in calls for one in _tensors(call) if one.dim() == 4}
    assert sum(masks.values()) == memory.masks_of(skeleton, CalibrationSpec(length=24, packing="separate"), 96)
    assert memory.masks_of(skeleton, CalibrationSpec(length=24), 96) == 0


def test_a_stack_that_an_adapter_is_added_to_passes_through_the_host(family_folder: Family) -> None:
    skeleton = Skeleton.of(str(family_folder("mixtral")))
    stack, numbers = max(one.numel() for layer in skeleton.layers for one in layer.parameters()), recovery_memory.weights(skeleton)
    for dtype in ("float32", "bfloat16"):
        spec = parsed({"method": "lora", "dtype": dtype, "stream": True})
        found = recovery_memory.peak(skeleton, spec, "cuda", parameters=numbers, original=numbers, streamed=True)
        assert found[2] >= stack * 8
