"""How a test makes a mistake on the command line, and what is expected then."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimoe import cli, progress
from trimoe.progress import LOG

BASE = ["--samples", "4", "--length", "32", "--quiet"]
UNIFORM = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "search": "greedy"}}]}
FACTORED = {"steps": [*UNIFORM["steps"], {"low_rank": {"ratio": 0.3, "rank": "importance"}}]}
Family = Callable[[str], Path]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder but the log, and what is in it."""
    files = sorted(path for path in (folder, *folder.rglob("*")) if path.is_file() and path.name != LOG)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Line:
    """The command line in this process: exit code, standard output, standard error (transformers' log lines included)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def run(self, *arguments: Any) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code: Any = 0
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["trimoe", *map(str, arguments)])
            patch.setattr(progress, "PLAIN_EVERY", 1e9)  # a busy machine makes any stage long
            for handler in logging.getLogger("transformers").handlers:
                if isinstance(handler, logging.StreamHandler):
                    patch.setattr(handler, "stream", sys.stderr)
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        return code, *self.capsys.readouterr()

    def refused(self, message: str, *arguments: Any) -> None:
        code, out, err = self.run(*arguments)
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, (code, err)
        assert len(lines) == 1 and lines[0].startswith("trimoe: "), err
        assert message in lines[0], err
        assert out == ""


def recipe_file(folder: Path, recipe: dict[str, Any] = UNIFORM) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def refused(
    line: Line, message: str, source: Path, text: Path, tmp_path: Path, *more: Any, recipe: Any = None, out: Path | None = None
) -> None:
    """`trimoe compress` says `message`; the output folder does not exist afterwards and the source is as it was."""
    before, target = snapshot(source), out or tmp_path / "out"
    given, before_out = target.exists(), snapshot(target)
    chosen = recipe if isinstance(recipe, str) else recipe_file(tmp_path, recipe or UNIFORM)
    line.refused(message, "compress", source, "--recipe", chosen, "--out", target, "--calibration", text, *BASE, *more)
    assert (target.exists(), snapshot(target)) == (given, before_out)
    assert snapshot(source) == before
