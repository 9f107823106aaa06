"""The report: every recipe's result has its page, which is safe, complete, and opens in a browser without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_bad_input import Line

import trimoe
from trimoe import UserError, card

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from trimoe.report import build, charts, page
from trimoe.report.section import Figure, Section, Table

Family = Callable[[str], Path]
SMALL: dict[str, Any] = {"samples": 4, "length": 32}
ALWAYS = {"summary", "quality", "traffic", "size", "decisions", "origin"}
RECIPES: dict[str, tuple[list[str], set[str]]] = {
    "expert-drop": ([], {"experts"}),
    "naee": ([], {"experts", "search"}),
    "moe-i2": (["steps.1.ratio=0.3"], {"experts", "search", "ranks"}),
    "low-rank": ([], {"ranks"}),
    "layer-drop": (["steps.0.ratio=0.34"], {"depth"}),
    "block-drop": (["steps.0.ratio=0.34"], {"depth"}),
    "slim-int4": (["steps.0.group=8"], {"numbers"}),
    "moe-pruner-2-4": ([], {"numbers"}),
    "layer-drop-full": (["steps.0.ratio=0.34", "recover.samples=8", "recover.length=32", "recover.steps=2"], {"depth", "recovery"}),
}
NASTY = "</script></style>\"'><img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture(scope="module")
def made(family_folder: Family, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished and evaluated folder of a built-in recipe; the same every time it is asked for."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            out, source = tmp_path_factory.mktemp("report") / name, family_folder("mixtral")
            trimoe.compress(source, name, out, changes=RECIPES[name][0], calibration=[str(text_file)], **SMALL)
            report = trimoe.evaluate(out, against=source, text=[f"letters={text_file}"], length=32, tokens=200)
            card.add_evaluation(out, report)
            folders[name] = out
        return folders[name]

    return get


class Read(HTMLParser):
    """Every tag and its attributes, scripts and texts of a page; it must be well nested."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def checked(html: str) -> Read:
    """What holds of every page."""
    read = Read(html)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in read.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
        for name in ("aria-labelledby", "href"):
            if name in attributes:
                assert (attributes[name] or "").lstrip("#") in ids
    assert [dict(attributes).get("type") for attributes, _ in read.scripts] == ["application/json", None, None]
    policy = next(meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy") or ""
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "connect-src" not in policy
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert allowed == [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for _, code in read.scripts[1:]]
    specs = json.loads(read.scripts[0][1])["specs"]
    drawn = [attributes["data-chart"] for attributes in read.all("div") if "data-chart" in attributes]
    assert sorted(drawn) == sorted(specs)
    assert len(read.all("figure")) == len(read.all("details")) == len(drawn), "every chart has its table"
    assert "http" not in json.dumps(specs)
    assert len(read.all("h1")) == 1 and len(read.all("main")) == 1 and read.all("html")[0]["lang"] == "en"
    return read


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_its_page(recipe: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made(recipe)
    (written,) = build.report([folder], tmp_path / "page.html")
    read = checked(written.read_text())
    assert {attributes["id"] for attributes in read.all("section")} == ALWAYS | RECIPES[recipe][1] | (
        {"experts"} if recipe not in ("slim-int4", "moe-pruner-2-4") else set()
    )
    record = json.loads((folder / "trimoe.json").read_text())
    assert record["command"] in read.text and record["versions"]["torch"] in read.text
    assert f"{record['plan']['after']['file_bytes']:,}" in read.text
    assert f"{record['evaluation']['texts'][0]['kl']:.4f}" in read.text


def test_parts_sum_to_what_lies_on_disk(made: Callable[[str], Path]) -> None:
    for recipe in RECIPES:
        folder = made(recipe)
        parts = json.loads((folder / "trimoe.json").read_text())["parts"]
        after = sum(sizes[1] for place in (parts["outside the layers"], *parts["layers"].values()) for sizes in place.values())
        assert after == json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"], recipe


def test_what_is_recorded_of_a_search_is_true(made: Callable[[str], Path]) -> None:
    for row in json.loads((made("naee") / "trimoe.json").read_text())["metrics"]["0.expert_drop"]["layers"].values():
        assert row["losses"][0] == row["exhaustive"] == row["trace"][-1][1] == min(value for _, value in row["trace"])
        assert row["exhaustive"] <= row["greedy"] and row["exhaustive"] <= row["random_trace"][-1][1] <= row["random"]
        assert row["sets"] == row["evaluations"] in (21, 28) and row["random_trace"][0][0] == 1
        falls = [value for _, value in row["random_trace"]]
        assert falls == sorted(falls, reverse=True) and len(row["score"]) == 8
    step = json.loads((made("expert-drop") / "trimoe.json").read_text())["metrics"]["0.expert_drop"]["layers"]["0"]
    assert len(step["score"]) == 8 and "losses" not in step, "scores are recorded where there was no search too"
    spectra = json.loads((made("low-rank") / "trimoe.json").read_text())["metrics"]["0.low_rank"]["spectra"]["0"]
    for entry in spectra.values():
        assert entry["median"][0] == 1.0 and entry["median"] == sorted(entry["median"], reverse=True) and len(entry["rank"]) <= 32


def everything(folder: Path, tmp_path: Path) -> Path:
    """The folder's record with all that an evaluation and a benchmark can add."""
    out = tmp_path / "everything"
    shutil.copytree(folder, out)
    record = json.loads((out / "trimoe.json").read_text())
    for row in record["evaluation"]["texts"]:
        row |= {
            "resampled": "documents",
            "intervals": {"perplexity": [1.0, 2.0], "kl": [0.1, 0.2], "agreement": [0.5, 0.6], "against_perplexity": [1.0, 2.0]},
        }
    record["evaluation"]["tasks"] = [
        {"task": "piqa", "metric": "acc", "n": 10, "value": 0.5, "stderr": None, "against": {"value": 0.6, "stderr": 0.01},
         "difference": -0.1, "difference_stderr": 0.02},
        {"task": "rte", "metric": "acc", "n": 10, "value": 0.5, "stderr": 0.1},
    ]  # fmt: skip
    written = {"loops": 0.25, "empty": 0.0, "distinct": None, "samples": [{"prompt": "a", "greedy": "b"}]}
    record["evaluation"]["generation"] = {"prompts": 4, "prompt_tokens": 8, "new_tokens": 8, "model": written, "against": written}
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    model = dict.fromkeys(("prefill_tokens_s", "decode_tokens_s", "first_token_s"), spread)
    model |= {"load_s": 1.0, "resident_bytes": 10, "peak_bytes": 10, "disk_bytes": 10, "dtype": "float32"}
    record["bench"] = {
        "batch": 1, "prompt": 8, "generate": 8, "rounds": 2, "machine": "here", "device": "cpu", "threads": 1, "torch": "2", "models": [model, model],
        "ratio": {**model, "load_s": 1.0},
    }  # fmt: skip
    (out / "trimoe.json").write_text(json.dumps(record))
    return out


def test_what_evaluations_add_is_shown(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = everything(made("moe-i2"), tmp_path)
    read = checked(build.report([folder], tmp_path / "page.html")[0].read_text())
    assert {"tasks-section", "generation", "speed"} <= {attributes["id"] for attributes in read.all("section")}
    assert "(0.1000 to 0.2000)" in read.text and "0.6000 \N{PLUS-MINUS SIGN} 0.0100" in read.text and "2.00x" in read.text
    card.refresh(folder)
    text = (folder / "README.md").read_text()
    assert "## Tasks" in text and "## Speed" in text and "(0.1000 to 0.2000)" in text


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
    assert (code, err) == (0, "") and str(naee / "report.html") in printed
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


def point(name: str, share: float, kl: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "method": "a", "bytes": int(share * 1000), "share": share, "kl": kl, "kl_low": None, "kl_high": None, **more}


def test_the_frontier_joins_what_nothing_beats() -> None:
    points = [
        point("small", 0.3, 0.5),
        point("worse", 0.6, 0.6),
        point("middle", 0.6, 0.1, kl_low=0.05, kl_high=0.2),
        point("big", 0.9, 0.01),
    ]
    rows = charts.labelled([{**entry, "low": None, "high": None} for entry in points], False)
    assert {row["name"] for row in rows if row["front"]} == {"small", "middle", "big"}
    assert [row["label"] for row in rows] == ["small", "worse", "middle", "big"]
    assert not all(row["label"] for row in charts.labelled([point(f"the same {n}", 0.5, 0.5) for n in range(9)], False)), (
        "names never pile up"
    )
    chart = charts.frontier(points)
    body = chart.to_dict()
    assert len(body["layer"]) == 4 and len(charts.frontier([point("one", 0.5, 0.0)]).to_dict()["layer"]) == 3
    assert "log" in json.dumps(charts.frontier([point("a", 0.5, 0.001), point("b", 0.6, 1.0)]).to_dict())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_it_opens_in_a_browser(made: Callable[[str], Path], tmp_path: Path) -> None:
    """No message on the console (a request would be one: the page's policy forbids all), every chart drawn, in light and in dark."""
    written = build.report([everything(made("moe-i2"), tmp_path)], tmp_path / "page.html")[0]
    count = len(json.loads(Read(written.read_text()).scripts[0][1])["specs"])
    for dark in ([], ["--blink-settings=preferredColorScheme=0"]):
        command = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / f'profile{len(dark)}'}", "--enable-logging=stderr",
            "--virtual-time-budget=60000", *dark, "--dump-dom", written.as_uri(),
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        assert f'data-drawn="{count}"' in ran.stdout, ran.stderr[-2000:]
        assert ran.stdout.count("graphics-document") + ran.stdout.count("<canvas") >= count
        assert ("Light mode" if dark else "Dark mode") in ran.stdout
        assert not [said for said in ran.stderr.splitlines() if "CONSOLE" in said]


# ---- the model card


def test_the_card_says_what_the_hub_reads(made: Callable[[str], Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    record = json.loads((made("moe-i2") / "trimoe.json").read_text())
    data = ModelCard(card.text(record)).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation" and data.base_model is None
    assert {"trimoe", "expert_drop", "low_rank"} <= set(data.tags)
    metrics = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert metrics["letters", "kl"] == pytest.approx(record["evaluation"]["texts"][0]["kl"], abs=1e-6)
    given = record | {"model": "mistralai/Mixtral-8x7B-v0.1", "source_card": {"license": "apache-2.0", "language": ["en", "fr"]}}
    data = ModelCard(card.text(given)).data
    assert (data.base_model, data.base_model_relation, data.license, data.language) == (
        given["model"],
        "finetune",
        "apache-2.0",
        ["en", "fr"],
    )
    packed = json.loads((made("slim-int4") / "trimoe.json").read_text()) | {"model": "a/b"}
    assert ModelCard(card.text(packed)).data.base_model_relation == "quantized"
    hostile = record | {"model": "a: [b\n---\n# c"}
    hostile["evaluation"]["texts"][0]["name"] = "x: {\n---"
    parsed = yaml.safe_load(card.text(hostile).split("\n---\n")[0].removeprefix("---\n"))
    assert parsed["model-index"][0]["results"][0]["dataset"]["name"] == "x: {\n---"


def test_licence_and_languages_are_carried_over(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(family_folder("mixtral"), source)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlanguage: [en]\ntags: [x]\ndatasets: 3\n---\n\n# It\n")
    trimoe.compress(source, "expert-drop", tmp_path / "out", calibration=[str(text_file)], **SMALL)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: other\n" in text and "license_name: mine\n" in text and "# It" not in text
    for broken in ("no front matter", "---\n[\n---\n", "---\nlicense: {a: b}\n---\n", "---\n- a\n---\n"):
        (source / "README.md").write_text(broken)
        assert card.inherited(source) == {}


def test_benchmarks_of_the_original_are_kept(
    made: Callable[[str], Path], family_folder: Family, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = everything(made("naee"), tmp_path)
    bench = json.loads((folder / "trimoe.json").read_text())["bench"]
    shutil.copyfile(made("naee") / "trimoe.json", folder / "trimoe.json")
    monkeypatch.setattr(trimoe, "bench", lambda *args, **kwargs: bench)
    monkeypatch.setattr("trimoe.tables.bench", lambda report: None)
    line = Line(monkeypatch, capsys)
    assert line.run("bench", folder, "-q")[0] == 0 and line.run("bench", folder, "--against", family_folder("olmoe"), "-q")[0] == 0
    assert "bench" not in json.loads((folder / "trimoe.json").read_text())
    assert line.run("bench", folder, "--against", family_folder("mixtral"), "-q")[0] == 0
    assert json.loads((folder / "trimoe.json").read_text())["bench"] == bench and "## Speed" in (folder / "README.md").read_text()


def test_pages_of_others_charts() -> None:
    """What `trimoe sweep` uses."""
    table = Table(caption="Numbers", head=("name", "KL"), rows=[("a", "0.1")])
    figure = Figure(name="frontier", title="Size against KL", chart=charts.frontier([point("a", 0.5, 0.1)]), table=table)
    read = checked(page.charts_page("A sweep", [Section(name="all", title="All", blocks=[figure])]))
    assert "A sweep" in read.text and "0.1" in read.text
