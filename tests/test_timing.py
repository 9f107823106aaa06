"""Expected time: what is counted, how it is shared out, what is measured and kept; and bytes between processes, against real ones."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from math import comb
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_distributed import NEW, torchrun

from trimoe import machine, recipe, timing, work
from trimoe.errors import UserError
from trimoe.machine import ROWS, Rates
from trimoe.methods import LowRank
from trimoe.skeleton import Skeleton
from trimoe.work import FEW, Work

Family = Callable[[str], Path]
SPEED = Rates((1e9, 4e9, 16e9, 16e9), 1e9, 1e8, 2e8, 1e9, 5e8, 1e9, 1e8, 5e7, 1e5)
MOE_I2 = {
    "steps": [
        {"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "genetic", "receptive_field": {"k": 2, "t": 2}}},
        {"low_rank": {"ratio": 0.3, "rank": "optimal"}},
    ]
}
COUNTING = """
import atexit, json, os, sys
import torch, trimoe
from torch import distributed as dist
source, text, out, recipe, options = json.loads(sys.argv[1])
sent = 0
def counted(name, nbytes):
    real = getattr(dist, name)
    def call(*args, **kwargs):
        global sent
        sent += nbytes(*args, **kwargs)
        return real(*args, **kwargs)
    setattr(dist, name, call)
others = int(os.environ["WORLD_SIZE"]) - 1
mine = lambda rank: int(os.environ["RANK"]) == rank
counted("broadcast", lambda tensor, src: tensor.nbytes * others if mine(src) else 0)
counted("send", lambda tensor, rank: tensor.nbytes)
rank = int(os.environ["RANK"])
counted("all_to_all_single", lambda taken, given, coming, going: given.nbytes - given.nbytes * going[rank] // max(1, sum(going)))
trimoe.compress(source, recipe, out, calibration=[text], **options)
open(f"{out}.{rank}", "w").write(str(sent))
"""


def test_speed_between_measured_numbers_of_rows() -> None:
    assert [SPEED.product(rows) for rows in ROWS] == pytest.approx([1e9, 4e9, 16e9, 16e9])
    assert SPEED.product(1) < SPEED.product(4) < SPEED.product(10) < SPEED.product(32) < SPEED.product(100) < SPEED.product(256)
    assert SPEED.product(1 << 20) == SPEED.product(2048) and SPEED.product(1) == pytest.approx(0.25e9)
    assert SPEED.seconds("matmul", 32e9, 256) == pytest.approx(2.0) and SPEED.seconds("write", 5e7) == pytest.approx(1.0)


def test_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure", lambda device, dtype: calls.append(device) or SPEED)
    assert machine.rates() == SPEED == machine.rates() and calls == ["cpu"]
    (file,) = (tmp_path / "trimoe").iterdir()
    assert json.loads(file.read_text())["double"] == 1e9
    file.write_text("{")  # damaged: measured again
    assert machine.rates() == SPEED and calls == ["cpu", "cpu"]
    machine.rates(dtype=torch.bfloat16)
    assert len(calls) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # no place to keep it
    assert machine.rates() == SPEED and len(calls) == 4


def test_a_busy_machine_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_folder: Family) -> None:
    busy = replace(SPEED, free=0.4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure", lambda device, dtype: busy)
    assert machine.rates() == busy and not list(tmp_path.rglob("*.json"))
    skeleton = Skeleton.of(str(family_folder("mixtral")))
    assert "got 40% of its processors" in timing.estimate(skeleton, recipe.load("naee"))["note"]
    monkeypatch.setattr(machine, "measure", lambda device, dtype: SPEED)
    assert "busy" not in timing.estimate(skeleton, recipe.load("naee"))["note"] and len(list(tmp_path.rglob("*.json"))) == 1


def test_what_is_free_is_this_process_share_of_its_threads() -> None:
    looks, used = iter([0.0, 0.05, 0.1, 0.15, 0.16]), iter([0.0, 0.04 * torch.get_num_threads()])
    assert machine._free(lambda: next(looks), lambda: next(used)) == pytest.approx(0.25)
    assert 0 < machine._free() <= 1.0


def test_a_few_eigenvectors_take_less_than_all(family_folder: Family) -> None:
    skeleton = Skeleton.of(str(family_folder("mixtral")))

    (site, *_), step = skeleton.sites.values(), LowRank(ratio=0.3, whiten="none")  # matrices of 48 x 32 and 32 x 24

    def cubes(rank: int, device: str) -> float:
        counted = work.Work(skeleton, recipe.load("low-rank"), device=device)._factored(site, (rank,) * site.num_experts, step)
        return sum(amount for kind, amount, _ in counted if kind == "eigh")

    every = site.num_experts * (32**3 + 24**3)
    assert cubes(8, device="cpu") == pytest.approx(FEW * every) and cubes(16, device="cpu") == cubes(8, device="cuda") == every


def test_speed_is_work_by_the_clock() -> None:
    """On a clock that goes a hundredth of a second at every look, whatever is done takes just that."""
    looks = count()
    found = machine.measure(clock=lambda: next(looks) / 100)
    assert found.matmul == pytest.approx([2 * rows * machine.SIDE**2 * 100 for rows in ROWS]) and found.ops == pytest.approx(100)
    assert found.double == pytest.approx(2 * machine.FACTORED**3 * 100) and found.memory == pytest.approx(2 * 4 * (1 << 22) * 100)
    assert [found.eigh, found.eigvalsh, found.cholesky, found.solve] == pytest.approx([machine.FACTORED**3 * 100] * 4)
    assert [found.read, found.write] == pytest.approx([(32 << 20) * 100] * 2)
    assert next(looks) < 9 * 10 * 3  # each constant within SPEND seconds


def test_the_best_of_several_times_counts() -> None:
    looks = iter([0.0, 0.0, 0.0, 0.05, 0.05, 0.05, 0.07, 0.07, 0.07, 0.11, 0.2])  # begun; then: still time?, start, end
    assert machine._best(lambda: None, "cpu", lambda: next(looks)) == pytest.approx(0.02)


def test_another_gpu_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    files = set()
    for name in ("NVIDIA A100", "NVIDIA H100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        files.add(machine._file("cuda:0", torch.float32))
    assert len(files) == 2


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(machine.Path, "home", nowhere)
    monkeypatch.setattr(machine, "measure", lambda device, dtype: SPEED)
    assert machine.rates() == SPEED


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_has_a_time(name: str, family_folder: Family) -> None:
    changes = ["steps.0.group=8"] if "int" in name and "drop" not in name else ["steps.1.group=8"] if "int" in name else []
    changes += ["steps.0.ratio=0.34"] if name.startswith("block-drop") else []  # of three layers
    one = timing.estimate(Skeleton.of(str(family_folder("qwen2_moe"))), recipe.load(name, changes), speed=SPEED)
    assert one["stages"][-1]["stage"].endswith("rite") and one["seconds"] > 0
    assert all(stage["seconds"] == stage["shared_seconds"] >= 0 and stage["network_bytes"] == 0 for stage in one["stages"])


def test_work_grows_as_it_should(family_folder: Family) -> None:
    skeleton = Skeleton.of(str(family_folder("mixtral")))

    def seconds(kinds: set[str], body: dict[str, Any], **calibration: Any) -> float:
        work = Work(skeleton, recipe.load({**body, "calibration": {"samples": 64, "length": 64, **calibration}}))
        return sum(amount for stage in work.stages() for kind, amount, _ in (*stage.shared, *stage.repeated) if kind in kinds)

    drop = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "score": "gate"}}]}
    assert seconds({"matmul"}, drop, samples=128) == pytest.approx(2 * seconds({"matmul"}, drop))  # twice the tokens
    assert seconds({"write"}, drop, samples=128) == seconds({"write"}, drop)
    low = {"steps": [{"low_rank": {"ratio": 0.3, "rank": "uniform"}}]}
    every = 3 * 8 * (min(48, 32) ** 3 + min(32, 24) ** 3)
    assert seconds({"eigh"}, low) == pytest.approx(FEW * every) and seconds({"eigvalsh"}, low) == 0
    optimal = {"steps": [{"low_rank": {"ratio": 0.3, "rank": "optimal"}}]}
    assert seconds({"eigvalsh"}, optimal) == every
    assert seconds({"solve"}, {"steps": [{"low_rank": {"ratio": 0.3, "rank": "uniform", "whiten": "none"}}]}) == 0


def test_sets_that_a_search_is_compared_with_are_counted(family_folder: Family) -> None:
    """8 experts, 2 go: 15 sets a greedy pass, 28 in all, so 20 random draws and all sets; and 8 of single experts."""
    skeleton = Skeleton.of(str(family_folder("mixtral")))

    def sets(search: str) -> list[float]:
        body = {
            "steps": [{"expert_drop": {"count": 2, "counts": "uniform", "search": search}}],
            "calibration": {"samples": 4, "length": 16},
        }
        stages = {stage.name: stage for stage in Work(skeleton, recipe.load(body)).stages()}
        first = 8  # positions of a token's order that two dropped of top-2 can touch
        each = 3 * 64 * first * 4 * work.PASSES  # bytes, of three layers
        return [
            sum(x for kind, x, _ in stages[name].shared if kind == "memory") / each for name in ("Search", "Compare with greedy and random")
        ]

    assert sets("greedy") == [15, 2 * 15 + 20 + comb(8, 2) + 8]
    assert sets("exhaustive") == [28, 2 * 15 + comb(8, 2) + 8]


def test_more_processes_take_less_time_and_send_more(family_folder: Family) -> None:
    skeleton, parsed = Skeleton.of(str(family_folder("mixtral"))), recipe.load(MOE_I2)
    with pytest.raises(UserError, match="makes 4 batches, too few for 8 processes"):  # as compress says it
        timing.estimate(skeleton, parsed, processes=8, speed=SPEED)
    timing.check_processes(skeleton, recipe.load({"steps": [{"quantize": {"method": "round", "group": 8}}]}), 8, "cpu")  # without text
    with pytest.raises(UserError, match="device 'gpu' is not known"):
        timing.estimate(skeleton, parsed, device="gpu")
    parsed = recipe.with_calibration(parsed, (), 512, None)
    found = [timing.estimate(skeleton, parsed, processes=count, speed=SPEED) for count in (1, 2, 8)]
    assert found[0]["seconds"] == found[2]["seconds"]
    assert found[0]["shared_seconds"] > found[1]["shared_seconds"] > found[2]["shared_seconds"] > found[0]["seconds"] / 8
    assert 0 == found[0]["network_bytes"] < found[1]["network_bytes"] < found[2]["network_bytes"]
    slow = timing.estimate(skeleton, parsed, speed=replace(SPEED, write=1.0))
    assert slow["stages"][-1]["seconds"] > found[0]["stages"][-1]["seconds"] + 1000


@NEW
@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [MOE_I2, {"steps": [{"quantize": {"bits": 8, "group": 8}}]}, {"steps": [{"weight_prune": {"ratio": 0.5}}]}],
    ids=["moe-i2", "quantize", "prune"],
)
def test_bytes_over_the_network_are_what_is_sent(body: dict[str, Any], tmp_path: Path) -> None:
    """Two processes over gloo, every byte counted where it leaves; pickles and decisions are not in the formulas."""
    families.save("mixtral", tmp_path / "source", hidden_size=64, intermediate_size=96)
    generator = random.Random(0)
    (tmp_path / "letters.txt").write_text("".join(generator.choice(string.ascii_lowercase + "    ") for _ in range(12000)))
    parsed = recipe.load({**body, "calibration": {"samples": 150, "length": 64}})
    script = tmp_path / "count.py"
    script.write_text(COUNTING)
    options = {"samples": 150, "length": 64}
    words = json.dumps([str(tmp_path / "source"), str(tmp_path / "letters.txt"), str(tmp_path / "out"), body, options])
    ran = torchrun(2, str(script), words)
    assert ran.returncode == 0, ran.stderr[-3000:]
    sent = sum(int((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    expected = timing.estimate(Skeleton.of(str(tmp_path / "source")), parsed, processes=2, speed=SPEED)["network_bytes"]
    assert 0.8 < expected / sent < 1.2, (expected, sent)
