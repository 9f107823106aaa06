"""What long work says while it runs, live, plain and quiet, and what it leaves in its log."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import UNIFORM, Line, snapshot
from rich.console import Console

import trimoe
from trimoe import progress
from trimoe.errors import UserError
from trimoe.journal import FOLDER, Journal
from trimoe.progress import LOG, QUIET, Reporter

Family = Callable[[str], Path]


def compress(family_folder: Family, text_file: Path, out: Path, recipe: Any = UNIFORM, **options: Any) -> Any:
    return trimoe.compress(str(family_folder("mixtral")), recipe, out, calibration=[str(text_file)], samples=6, length=32, **options)


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal: a line now and then, even within one item, with the time left, tokens a second and memory."""
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.02)
    reporter = Reporter("auto")
    assert reporter.mode == "plain"
    for _ in reporter.track(range(2), "Walk", 2, tokens=1000):
        time.sleep(0.4)
    with reporter.stage("Think"):
        time.sleep(0.4)
    shown = capsys.readouterr().err.splitlines()
    assert any(row.startswith("Walk: 0/2, ") and "GiB" in row for row in shown)
    assert any(row.startswith("Walk: 1/2, ") and "s left, " in row and "tokens/s" in row for row in shown)
    done = next(row for row in shown if row.startswith("Walk: done in "))
    assert 100 < float(done.split(", ")[1].removesuffix(" tokens/s").replace(",", "")) <= 5000
    assert any(row.startswith("Think: ") for row in shown) and not any(row.startswith("Think: done") for row in shown)


def test_plain_on_a_terminal_that_is_told_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    assert Reporter("auto").mode == "auto"
    monkeypatch.setenv("TERM", "dumb")
    assert Reporter("auto").mode == "plain"


def test_a_log_inside_a_log(tmp_path: Path) -> None:
    reporter = Reporter("quiet")
    with reporter.logging(tmp_path / "outer", []):
        with reporter.logging(tmp_path / "inner", []):
            reporter.say("within")
        reporter.say("after")
    assert "within" not in (tmp_path / "outer").read_text() and "after" in (tmp_path / "outer").read_text()
    assert "within" in (tmp_path / "inner").read_text()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.01)
    reporter = Reporter("quiet")
    with reporter.stage("Think"):
        assert list(reporter.track(range(3), "Walk", 3)) == [0, 1, 2]
    reporter.say("Hello")
    assert capsys.readouterr() == ("", "")


def test_live_on_a_terminal() -> None:
    reporter = Reporter("auto")
    reporter.mode, reporter.console = "auto", Console(file=io.StringIO(), force_terminal=True, width=120)
    assert list(reporter.track(range(3), "Walk", 3, tokens=10)) == [0, 1, 2]
    with reporter.steps("Train", 4, 8, tokens=10) as advance:
        advance(6, ", loss 1.5")
    shown = reporter.console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in shown and "tokens/s" in shown and "GiB" in shown and "Train, loss 1.5" in shown and "6/8" in shown


def test_log_of_a_run(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    compress(family_folder, text_file, tmp_path / "out", command="trimoe compress THIS")
    log = (tmp_path / "out" / LOG).read_text().splitlines()
    assert all(row[4] == "-" and row[19] == "Z" for row in log)
    said = [row.partition("  ")[2] for row in log]
    assert said[0].endswith(": trimoe compress THIS") and said[1].startswith("python ") and "torch" in said[1] and "threads" in said[1]
    for stage in ("Read headers and plan", "Tokenise the calibration text", "Statistics", "Search", "Write"):
        assert any(row.startswith(f"{stage}: begins") for row in said), stage
        assert any(row.startswith(f"{stage}: done in ") and "peak" in row for row in said), stage
    assert any(row.startswith("warning: ") for row in said) and said[-1].endswith("GiB of memory")
    record = json.loads((tmp_path / "out" / "trimoe.json").read_text())
    assert LOG not in json.dumps(record)


def test_log_is_no_part_of_what_is_compared(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compress(family_folder, text_file, tmp_path / name)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") and LOG not in snapshot(tmp_path / "a")
    before = (tmp_path / "a" / LOG).read_text()
    compress(family_folder, text_file, tmp_path / "a")  # done already: nothing to tell
    assert (tmp_path / "a" / LOG).read_text() == before


def test_warnings_are_said_before_the_work(
    family_folder: Family, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(family_folder, text_file, tmp_path / "said", reporter=Reporter("plain"))
    lines = capsys.readouterr().err.splitlines()
    planned = [line for line in lines if line.startswith("warning: ") and "saw fewer" not in line]
    warned = [lines.index(line) for line in planned]
    assert warned and max(warned) < next(number for number, line in enumerate(lines) if line.startswith("Statistics"))
    said = (tmp_path / "said" / LOG).read_text()
    assert said.count("warning: ") == sum(line.startswith("warning: ") for line in lines) > len(warned)
    stamps = [line.split()[0] for line in said.splitlines()]
    assert stamps == sorted(stamps), "the head, too, is of when the run began"
    compress(family_folder, text_file, tmp_path / "quiet", reporter=Reporter("quiet"))
    assert capsys.readouterr() == ("", "") and "warning: " in (tmp_path / "quiet" / LOG).read_text()


def test_what_is_said_outside_runs_is_in_no_log(tmp_path: Path) -> None:
    """One reporter, several logs, as in a sweep."""
    reporter = Reporter("quiet").fresh()
    reporter.say("before")
    for number in range(3):
        with reporter.logging(tmp_path / f"{number}.log", ["head"]):
            reporter.say(f"inside {number}")
        reporter.say("between")
        assert reporter.early is None, "nothing piles up"
    with pytest.raises(ZeroDivisionError), reporter.logging(tmp_path / "failed.log", []):
        _ = 1 / 0
    assert reporter.log is None and reporter.early is None
    said = [(tmp_path / f"{number}.log").read_text() for number in range(3)]
    assert "between" not in "".join(said) and [text.count("inside") for text in said] == [1, 1, 1]
    assert "before" in said[0] and "before" not in said[1]


def test_log_goes_on_when_a_run_is_resumed(family_folder: Family, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimoe.output.writer import Writer

    real = Writer.finish
    monkeypatch.setattr(Writer, "finish", lambda self, side: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compress(family_folder, text_file, tmp_path / "out")
    assert "Stopped: ZeroDivisionError" in (tmp_path / "out" / LOG).read_text()
    monkeypatch.setattr(Writer, "finish", real)
    compress(family_folder, text_file, tmp_path / "out")
    said = (tmp_path / "out" / LOG).read_text()
    assert said.count("python ") == 2 and said.index("Stopped") < said.index("Write: done", said.index("Stopped"))
    compress(family_folder, text_file, tmp_path / "whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_nothing_is_logged_of_a_mistake(family_folder: Family, text_file: Path, tmp_path: Path, line: Line) -> None:
    out = tmp_path / "out"
    line.refused("is not possible", "compress", family_folder("mixtral"), "-r", "expert-drop", "--set", "steps.0.ratio=0.9", "-o", out)
    assert not out.exists()
    out.mkdir()
    (out / LOG).write_text("somebody's")
    line.refused(
        "is not empty",
        "compress",
        family_folder("mixtral"),
        "-r",
        "expert-drop",
        "-o",
        out,
        "-c",
        text_file,
        "--samples",
        4,
        "--length",
        16,
    )
    assert (out / LOG).read_text() == "somebody's" and QUIET.early is None


def test_a_folder_with_a_log_alone_can_go_on(tmp_path: Path) -> None:
    """A recipe with recovery logs to the folder before its journal has begun there."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / LOG).write_text("")
    Journal(tmp_path, {}).refuse_other_content()
    (tmp_path / "other").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        Journal(tmp_path, {}).refuse_other_content()


def test_statistics_log_beside_their_file(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    trimoe.gather_statistics(str(family_folder("mixtral")), tmp_path / "stats", calibration=[str(text_file)], samples=4, length=32)
    said = (tmp_path / "stats.log").read_text()
    assert "Statistics: done in" in said and "tokens/s" in said


def test_recovery_logs_once_beside_its_result(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    training = {"method": "router", "samples": 8, "length": 32, "batch": 4, "holdout": 0.25, "data": str(text_file)}
    compress(family_folder, text_file, tmp_path / "out", {**UNIFORM, "recover": training})
    said = (tmp_path / "out" / LOG).read_text()
    assert "Write: done" in said and "Train, router, loss" in said and sorted(tmp_path.rglob(LOG)) == [tmp_path / "out" / LOG]
