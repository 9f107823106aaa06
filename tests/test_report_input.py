"""The report where something is wrong: files of others, damaged and hostile records; and on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import checked, everything
from refusals import Line

import trimoe
from trimoe import UserError
from trimoe.output import card
from trimoe.output.record import Record

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from trimoe.report import build, page

pytestmark = pytest.mark.xdist_group("pages")  # on one worker, which makes the folders once
NASTY = "</script></style>\"'><img src=x onerror=alert(1)><script>alert(2)</script>"


def test_files_that_are_no_pages_are_not_replaced(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, folder = Line(monkeypatch, capsys), Path(shutil.copytree(made("naee"), tmp_path / "folder"))
    own, config = tmp_path / "mine.html", (folder / "config.json").read_text()
    own.write_text('<html><head><meta name="generator" content="hugo"></head>mine</html>')
    line.refused("is no page that trimoe wrote", "report", folder, "--html", own)
    line.refused("give one that ends in .html", "report", folder, "--html", folder / "config.json")
    (folder / "report.html").write_text("notes")
    line.refused("is no page that trimoe wrote", "report", folder)
    line.refused("give a folder, in one that exists", "report", folder, "--html", tmp_path / "new.html", "--figures", own)
    for path in (own, folder / "config.json", folder / "trimoe.json", tmp_path, tmp_path / "absent" / "page.html"):
        with pytest.raises(UserError):
            build.report([folder], path)
    with pytest.raises(UserError, match="give a folder, in one that exists"):
        build.report([folder], figures=own)
    assert "mine" in own.read_text() and (folder / "report.html").read_text() == "notes" and (folder / "config.json").read_text() == config
    assert not (tmp_path / "new.html").exists()
    (first,) = build.report([folder], tmp_path / "page.html")
    assert page.GENERATOR in first.read_bytes()[: page.HEAD] and build.report([folder], first) == [first]


def test_a_damaged_record_stops_before_the_page(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, folder = Line(monkeypatch, capsys), Path(shutil.copytree(made("naee"), tmp_path / "folder"))
    record = json.loads((folder / "trimoe.json").read_text())
    for spoiled in ({"recipe": {}}, {"recipe": {"steps": [3]}}, {"plan": {**record["plan"], "layers": [{}]}}):
        (folder / "trimoe.json").write_text(json.dumps(record | spoiled))
        line.refused("does not read as trimoe writes it", "report", folder)
    assert not (folder / "report.html").exists()


def test_hostile_records_stay_text(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = everything(made("moe-i2"), tmp_path)

    def spoiled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: spoiled(entry, name) for name, entry in value.items()}
        if isinstance(value, list):
            return [spoiled(entry, key) for entry in value]
        return NASTY if isinstance(value, str) and key not in ("gone", "resampled") else value

    record = spoiled(json.loads((folder / "trimoe.json").read_text()))
    (folder / "trimoe.json").write_text(json.dumps(record))
    other = tmp_path / "<script>alert(3)<"
    shutil.copytree(folder, other)
    for folders in ([other], [folder, other]):
        read = checked(build.report(folders, tmp_path / "page.html")[0].read_text())
        assert "img" not in {tag for tag, _ in read.tags} and NASTY in read.text
        assert "alert(3)" in read.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record.pop("plan"), "lacks plan"),
        (lambda record: record.update(decisions=[]), "does not read as trimoe writes it"),
        (lambda record: record["plan"].update(before={}), "does not read as trimoe writes it"),
        (lambda record: record["evaluation"]["texts"][0].update(kl=float("inf")), "does not read as trimoe writes it"),
    ],
)
def test_broken_records_are_one_sentence(spoil: Callable[[Any], Any], message: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "broken"
    shutil.copytree(made("naee"), out)
    record = json.loads((out / "trimoe.json").read_text())
    spoil(record)
    (out / "trimoe.json").write_text(json.dumps(record).replace("Infinity", "1e999"))
    with pytest.raises(UserError, match=message):
        build.report([out], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_on_the_command_line(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, naee, other = Line(monkeypatch, capsys), made("naee"), made("expert-drop")
    (naee / "README.md").write_text("old")
    code, printed, err = line.run("report", naee, "--figures", tmp_path / "figures")
    assert code == 0 and err.startswith("Draw the figures: done in ") and err.count("\n") == 1 and str(naee / "report.html") in printed
    assert line.run("report", naee, "--figures", tmp_path / "figures", "-q")[::2] == (0, "")
    assert (naee / "report.html").is_file() and "# " in (naee / "README.md").read_text(), "the card is refreshed"
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert {"importance.svg", "importance.png", "search-trace.svg", "kl.png"} <= set(names)
    assert (tmp_path / "figures" / "kl.png").read_bytes().startswith(b"\x89PNG")
    line.refused("say where to write it: --html FILE", "report", naee, other)
    line.refused("is no finished trimoe folder", "report", tmp_path)
    line.refused("give a file in a folder that exists", "report", naee, "--html", tmp_path / "no" / "page.html")
    code, _, err = line.run("report", naee, other, "--html", tmp_path / "both.html")
    assert (code, err) == (0, "")
    read = checked((tmp_path / "both.html").read_text())
    assert {"frontier", "kl-by-text"} <= {attributes.get("data-chart") for attributes in read.all("div")}


def test_a_comparison_says_what_was_trained_and_what_cannot_be_compared(
    made: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    folder, trained = made("moe-pruner-2-4"), tmp_path / "trained"
    command = "trimoe recover it"
    trimoe.recover(folder, trained, {"method": "experts", "samples": 8, "length": 16, "steps": 1, "data": str(text_file)}, command=command)
    folders = [everything(folder, tmp_path), trained]

    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])

    def shown(tokens: int = 64, texts: tuple[str, ...] = (f"a={text_file}", f"b={other}")) -> str:
        for one, names in zip(folders, ((f"a={text_file}", f"b={other}"), texts), strict=True):
            count = tokens if one == trained else 64
            record = Record.read(one)
            card.keep(record.with_evaluation(trimoe.evaluate(one, against=record.origin(), text=names, length=16, tokens=count)))
        return build.report(folders, tmp_path / "both.html")[0].read_text()

    alike = shown()
    assert "weight_prune + recover (experts)" in alike and command in alike and "NOT evaluated alike" not in alike
    assert "NOT evaluated alike" not in shown(texts=(f"b={other}", f"a={text_file}"))
    assert "NOT evaluated alike" in shown(texts=(f"a={other}", f"b={text_file}")), "texts of the same names and lengths"
    assert "NOT evaluated alike" in shown(32)


def test_pictures_of_others_are_not_replaced(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder, own = made("naee"), tmp_path / "figures"
    first = build.report([folder], figures=own)
    assert build.report([folder], figures=own) == first
    with pytest.raises(UserError, match="in one that exists"):
        build.report([folder], figures=tmp_path / "absent" / "figures")
    for name, text in (("kl.svg", "<svg>mine</svg>"), ("kl.png", "mine")):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        (other / name).write_text(text)
        with pytest.raises(UserError, match="was not drawn by trimoe"):
            build.report([folder], tmp_path / "page.html", other)
        assert [path.read_text() for path in other.iterdir()] == [text] and not (tmp_path / "page.html").exists()
