"""Runs that were interrupted, repeated, or started twice: the same bytes in the end, or a sentence that says why not."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import FACTORED, UNIFORM, Line, snapshot

import trimoe
from trimoe import UserError
from trimoe.journal import Journal
from trimoe.methods import ExpertDrop, LowRank
from trimoe.methods.lab import Lab
from trimoe.output.writer import Writer

Family = Callable[[str], Path]
JOB = importlib.import_module("trimoe.compress")  # trimoe.compress is the function of that name
UNEVEN: dict[str, Any] = {"steps": [{"expert_drop": {"ratio": 0.4, "search": "exhaustive", "receptive_field": {"k": 2, "t": 2}}}]}


def compress(source: Path, text: Path, out: Path, recipe: dict[str, Any] = FACTORED, **options: Any) -> trimoe.Result:
    return trimoe.compress(source, recipe, out, calibration=[str(text)], **{"samples": 4, "length": 32, **options})


def stop(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("power cut")


def cut_before_transform(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(JOB, "transform", stop)


def cut_inside_a_shard(patch: pytest.MonkeyPatch) -> None:
    put = Writer.put
    patch.setattr(Writer, "put", lambda self, group, made=None: stop() if group == 2 else put(self, group, made))


def cut_between_shards(patch: pytest.MonkeyPatch) -> None:
    cut_inside_a_shard(patch)
    patch.setattr("trimoe.output.layout.MAX_SHARD", 1)


def cut_before_config(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trimoe.output.writer.copy_file", stop)


def cut_before_decisions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trimoe.methods.low_rank.low_rank.LowRank.decide", stop)


def cut_inside_decisions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("trimoe.methods.expert_drop.choice.Choice._recorded", stop)


CUTS = [cut_inside_decisions, cut_before_decisions, cut_before_transform, cut_inside_a_shard, cut_between_shards, cut_before_config]


def interrupted(cut: Callable[[pytest.MonkeyPatch], None], source: Path, text: Path, out: Path, recipe: dict[str, Any] = FACTORED) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut(patch)
        with pytest.raises(RuntimeError, match="power cut"):
            compress(source, text, out, recipe)
    assert (out / ".trimoe" / "inputs.json").is_file()
    assert not (out / "config.json").exists(), "an unfinished folder must not look like a model"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_resumed_run_writes_the_same_bytes(
    cut: Callable[[pytest.MonkeyPatch], None], family: str, family_folder: Family, text_file: Path, tmp_path: Path
) -> None:
    source = family_folder(family)
    before = snapshot(source)
    with pytest.MonkeyPatch.context() as patch:
        if cut is cut_between_shards:
            patch.setattr("trimoe.output.layout.MAX_SHARD", 1)
        whole = compress(source, text_file, tmp_path / "whole")
        interrupted(cut, source, text_file, tmp_path / "cut")
        resumed = compress(source, text_file, tmp_path / "cut")
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")
    assert (resumed.decisions, resumed.plan) == (whole.decisions, whole.plan)
    assert json.dumps(resumed.metrics) == json.dumps(whole.metrics)
    assert snapshot(source) == before


def test_what_was_decided_is_not_decided_again(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    interrupted(cut_before_transform, family_folder("mixtral"), text_file, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        for method in (ExpertDrop, LowRank):
            patch.setattr(method, "decide", stop)
        patch.setattr(Lab, "statistics", stop)
        compress(family_folder("mixtral"), text_file, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"recipe": UNIFORM}, "recipe"), ({"seed": 1}, "seed|calibration"), ({"samples": 5}, "recipe"),
    ],
)  # fmt: skip
def test_unfinished_folders_take_no_other_run(
    options: dict[str, Any], what: str, family_folder: Family, text_file: Path, tmp_path: Path
) -> None:
    source, out = family_folder("mixtral"), tmp_path / "out"
    interrupted(cut_before_transform, source, text_file, out)
    before = snapshot(out)
    with pytest.raises(UserError, match=f"holds an unfinished run with another ({what})"):
        compress(source, text_file, out, **options)
    with pytest.raises(UserError, match="holds an unfinished run with another model"):
        compress(family_folder("qwen3_moe"), text_file, out)
    assert snapshot(out) == before


def test_refusals_of_unfinished_and_busy_folders_on_the_command_line(
    family_folder: Family, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, line = family_folder("mixtral"), tmp_path / "out", Line(monkeypatch, capsys)
    (tmp_path / "mine.yaml").write_text(json.dumps(FACTORED))
    command = ["compress", source, "-r", tmp_path / "mine.yaml", "-o", out, "-c", text_file, "--samples", "4", "--length", "32", "-q"]
    interrupted(cut_before_transform, source, text_file, out)
    before, inputs = snapshot(out), json.loads((out / ".trimoe" / "inputs.json").read_text())
    line.refused("holds an unfinished run with another recipe", *command, "--set", "steps.1.alpha=0.5")
    with Journal(out, inputs):
        line.refused("Another run is writing to", *command)
    assert snapshot(out) == before
    code, printed, err = line.run(*command)
    assert (code, err) == (0, "")
    assert "native checkpoint" in printed


@pytest.mark.parametrize("recipe", [UNIFORM, FACTORED, UNEVEN])
def test_a_finished_folder_is_left_alone(recipe: dict[str, Any], family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    source, out = family_folder("mixtral"), tmp_path / "out"
    first = compress(source, text_file, out, recipe)
    before, times = snapshot(out), {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JOB, "decide", stop)
        again = compress(source, text_file, out, recipe)
    assert (again.out, again.decisions, again.plan) == (first.out, first.decisions, first.plan)
    assert json.dumps(again.metrics) == json.dumps(first.metrics)
    assert snapshot(out) == before and {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    with pytest.raises(UserError, match="holds a finished result made with another seed"):
        compress(source, text_file, out, recipe, seed=1)
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "spoil",
    [{"plan": 3}, {"plan": {"layers": None}}, {"plan": None}, {"metrics": []}, {"decisions": {"0": 3}}, {"inputs": 3}, {"evaluation": 3}],
)
def test_a_finished_folder_whose_record_is_damaged_is_refused(
    spoil: dict[str, Any], family_folder: Family, text_file: Path, tmp_path: Path
) -> None:
    source, out = family_folder("mixtral"), tmp_path / "out"
    compress(source, text_file, out, UNIFORM)
    record = json.loads((out / "trimoe.json").read_text())
    (out / "trimoe.json").write_text(json.dumps({name: value for name, value in (record | spoil).items() if value is not None}))
    before = snapshot(out)
    with pytest.raises(UserError, match=r"trimoe\.json does not read as trimoe writes it"):
        compress(source, text_file, out, UNIFORM)
    assert snapshot(out) == before
