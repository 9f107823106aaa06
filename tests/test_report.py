"""The report: every recipe's result has its page, which is safe, complete, and opens in a browser without a network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import families
import pytest
import yaml
from test_bad_input import Line

import trimoe
from trimoe import UserError, card

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from trimoe import recorded, words
from trimoe.layout import Layout
from trimoe.methods.method import unchanged
from trimoe.report import build, charts, page, size
from trimoe.report.read import Finished
from trimoe.report.section import Code, Figure, Section, Table
from trimoe.skeleton import Skeleton

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
SHARED = ("qwen2_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe")  # have shared experts
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
    ways = {"greedy": {"loops": 0.5, "empty": 0.0, "distinct": 0.125}, "sampled": {"loops": 0.0, "empty": 0.0, "distinct": None}}
    written = {
        "loops": 0.25,
        "empty": 0.0,
        "distinct": 0.125,
        **ways,
        "samples": [{"prompt": "a", "greedy": "goes on", "sampled": "wanders"}],
    }
    record["evaluation"]["commands"] = {"texts": "trimoe eval THIS", "tasks": "trimoe eval THAT", "generation": "trimoe eval THIS"}
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


def values_of(figure: Figure) -> list[dict[str, Any]]:
    """What its chart is drawn from."""
    (values,) = figure.chart.to_dict()["datasets"].values()
    return list(values)


def test_greedy_and_sampled_are_told_apart(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = everything(made("moe-i2"), tmp_path)
    section = next(section for section in build.full(Finished.open(folder)) if section.name == "generation")
    figure, samples = section.blocks
    assert isinstance(figure, Figure) and isinstance(samples, Table)
    drawn = {(row["what"], row["model"]): row["share"] for row in values_of(figure)}
    assert (
        drawn["in a loop,\ngreedy", "compressed"] == 0.5
        and drawn["in a loop,\nsampled", "compressed"] == 0.0
        and 0.25 not in drawn.values()
    )
    assert ("greedy", "original", "50.0%", "0.0%", "12.5%") in figure.table.rows and (
        "sampled",
        "compressed",
        "0.0%",
        "0.0%",
        "-",
    ) in figure.table.rows
    assert ("compressed", "greedy", "a", "goes on") in samples.rows and ("original", "sampled", "a", "wanders") in samples.rows


def test_warnings_are_a_list(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("naee")
    warnings = json.loads((folder / "trimoe.json").read_text())["plan"]["warnings"]
    page = build.report([folder], tmp_path / "page.html")[0].read_text()
    assert len(warnings) > 1 and checked(page)
    listed = re.findall(r"<li>([^<]*)</li>", page.partition('class="warnings"')[2].partition("</div>")[0])
    assert [html.unescape(entry) for entry in listed] == warnings


def test_how_it_was_measured_is_said(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = everything(made("moe-i2"), tmp_path)
    titles = {block.title: block.text for block in size.origin(Finished.open(folder)).blocks if isinstance(block, Code)}
    assert titles["To measure texts and generation"] == "trimoe eval THIS" and titles["To measure tasks"] == "trimoe eval THAT"
    record = json.loads((folder / "trimoe.json").read_text())
    record["evaluation"]["commands"] = {"texts": record["command"]}
    record["bench"]["command"] = "trimoe bench"
    (folder / "trimoe.json").write_text(json.dumps(record))
    assert [block.title for block in size.origin(Finished.open(folder)).blocks if isinstance(block, Code)] == [
        "Command",
        "To measure speed",
        "Recipe",
    ]


def test_numbers_have_the_same_digits() -> None:
    assert [words.short(count, words.COUNTS) for count in (2_000_000, 4_066_000, 999_600, 72_000, 812, 46_700_000_000)] == [
        "2.00M", "4.07M", "1.00M", "72.0K", "812", "46.7B"
    ]  # fmt: skip


@pytest.mark.parametrize("family", families.FAMILIES)
def test_bytes_by_part(family: str, family_folder: Family) -> None:
    """Every tensor is in a part, the same before and after where nothing changes, and the parts are where one would look for them."""
    skeleton = Skeleton.of(str(family_folder(family)))
    made = recorded.parts(Layout(skeleton, unchanged(skeleton.sites)))
    assert all(before == after for place in (made["outside the layers"], *made["layers"].values()) for before, after in place.values())
    assert list(made["outside the layers"]) == ["embedding", "norms", "head"]
    for index, sizes in made["layers"].items():
        assert list(sizes) == [part for part in words.PARTS if part in sizes]
        site = skeleton.sites.get(int(index))
        shared = {"shared experts"} if site is not None and family in SHARED else set()
        feed = {"dense MLPs"} if site is None else {"routers", "routed experts"} | shared
        assert set(sizes) == {"attention", "norms"} | feed, (family, index)
        if site is not None:
            keys = {
                key
                for path in site.router_paths()
                for key in skeleton.source_keys(f"{skeleton.layer_name(int(index))}.{site.block}.{path}")
            }
            assert sizes["routers"][0] == sum(skeleton.checkpoint.tensors[key].nbytes for key in keys)


def test_parts_are_drawn_in_one_order(made: Callable[[str], Path], tmp_path: Path) -> None:
    def shown(folder: Path) -> list[str]:
        section = size.size(Finished.open(folder))
        figure = next(block for block in section.blocks if isinstance(block, Figure) and block.name == "size-parts")
        rows = values_of(figure)
        assert list(dict.fromkeys(row["model"] for row in rows)) == ["compressed", "original"]
        assert [row["part"] for row in rows if row["model"] == "original"] == [row["part"] for row in rows if row["model"] == "compressed"]
        return [row[0] for row in figure.table.rows]

    folder = Path(shutil.copytree(made("layer-drop"), tmp_path / "copy"))
    assert shown(folder) == ["embedding", "attention", "routers", "routed experts", "norms", "head"]


def test_two_steps_of_one_kind(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    """Their figures have names of their own."""
    step = {"expert_drop": {"ratio": 0.125, "counts": "optimal", "search": "greedy"}}
    trimoe.compress(family_folder("mixtral"), {"steps": [step, step]}, tmp_path / "out", calibration=[str(text_file)], **SMALL)
    page = build.report([tmp_path / "out"], tmp_path / "page.html")[0].read_text()
    drawn = {attributes.get("data-chart") for attributes in checked(page).all("div")}
    assert {"layer-importance", "layer-importance-2", "sensitivity-expert-drop", "sensitivity-expert-drop-2"} <= drawn


def test_what_a_result_is_called(made: Callable[[str], Path], tmp_path: Path) -> None:
    for recipe, form, head in (
        ("slim-int4", "compressed-tensors", "| layer | experts | bits of a weight |"),
        ("moe-pruner-2-4", "stock", "| layer | experts | zeros |"),
        ("low-rank", "native", "| layer | experts | mean rank, first / last projection |"),
        ("naee", "stock", "| layer | experts before | after |"),
    ):
        text = (made(recipe) / "README.md").read_text()
        assert head in text.splitlines() and ("This is a stock checkpoint" in text) == (form == "stock"), recipe
        page = build.report([made(recipe)], tmp_path / "page.html")[0].read_text()
        assert f"Written as a {form} checkpoint" in page


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
    line.refused("which is a file", "report", folder, "--html", tmp_path / "new.html", "--figures", own)
    for path in (own, folder / "config.json", folder / "trimoe.json", tmp_path, tmp_path / "absent" / "page.html"):
        with pytest.raises(UserError):
            build.report([folder], path)
    with pytest.raises(UserError, match="which is a file"):
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


def opened(path: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The document as it is after a minute of a browser's time, and what its console said."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr",
        "--virtual-time-budget=60000", *options, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_it_opens_in_a_browser(made: Callable[[str], Path], tmp_path: Path) -> None:
    """No message on the console (a request would be one: the page's policy forbids all), every chart drawn, in light and in dark."""
    written = build.report([everything(made("moe-i2"), tmp_path)], tmp_path / "page.html")[0]
    count = len(json.loads(Read(written.read_text()).scripts[0][1])["specs"])
    for dark in ([], ["--blink-settings=preferredColorScheme=0"]):
        ran = opened(written, tmp_path / f"profile{len(dark)}", *dark)
        assert f'data-drawn="{count}"' in ran.stdout, ran.stderr[-2000:]
        assert ran.stdout.count("graphics-document") + ran.stdout.count("<canvas") >= count
        assert ("Light mode" if dark else "Dark mode") in ran.stdout
        assert not [said for said in ran.stderr.splitlines() if "CONSOLE" in said]


MEASURE = """<script>
(function look() {
  if (!document.documentElement.dataset.drawn) { setTimeout(look, 100); return; }
  const wrong = [];
  for (const svg of document.querySelectorAll(".chart svg.marks")) {
    const outer = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll(".role-axis-title text, .role-axis-label text, .role-legend text")) {
      const inner = text.getBoundingClientRect(), out = inner.left < outer.left - 1 || inner.right > outer.right + 1;
      if (inner.width && out) wrong.push(svg.closest(".chart").dataset.chart + ": " + text.textContent);
    }
  }
  const scrolls = [...document.querySelectorAll("table")].every((table) => table.closest(".scroll"));
  const found = { wrong, scrolls, width: window.innerWidth, page: document.documentElement.scrollWidth };
  parent.document.body.append(Object.assign(parent.document.createElement("pre"), { id: "found", textContent: JSON.stringify(found) }));
})();
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_it_fits_on_a_phone(made: Callable[[str], Path], tmp_path: Path) -> None:
    """390 pixels wide: the page itself does not scroll sideways (tables and wide charts do, in themselves), and no title, label or legend of
    a chart is cut off."""
    written = build.report([everything(made("naee"), tmp_path)], tmp_path / "page.html")[0].read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", written)
    frame = html.escape(page.removesuffix("</body>\n</html>") + MEASURE)  # a window has 500 pixels at least
    (tmp_path / "frame.html").write_text(f'<body><iframe srcdoc="{frame}" width="390" height="844" style="border: 0"></iframe>')
    shown = opened(tmp_path / "frame.html", tmp_path / "phone", "--hide-scrollbars").stdout
    found = json.loads(html.unescape(shown.rpartition('<pre id="found">')[2].partition("</pre>")[0]))
    assert found["width"] == 390 and found["page"] == 390 and found["scrolls"] and found["wrong"] == []


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
    kept = json.loads((folder / "trimoe.json").read_text())["bench"]
    assert kept.pop("command").startswith("trimoe bench ") and kept == bench and "## Speed" in (folder / "README.md").read_text()


def test_what_was_measured_is_saved_before_it_is_printed(
    made: Callable[[str], Path], family_folder: Family, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The reader of the table may be gone: trimoe bench ... | head."""
    folder, plain = everything(made("naee"), tmp_path), made("naee") / "trimoe.json"
    record = json.loads((folder / "trimoe.json").read_text())

    def gone(report: Any) -> None:
        raise OSError(5, "Input/output error")

    line = Line(monkeypatch, capsys)
    for verb, name, part in (("bench", "bench", "bench"), ("eval", "evaluate", "evaluation")):
        shutil.copyfile(plain, folder / "trimoe.json")
        found = dict(record[part])
        monkeypatch.setattr(trimoe, name, lambda *args, found=found, **kwargs: found)
        monkeypatch.setattr(f"trimoe.tables.{'bench' if verb == 'bench' else 'evaluation'}", gone)
        code, _, err = line.run(verb, folder, "--against", family_folder("mixtral"), "-q", "--json", tmp_path / f"{verb}.json")
        assert code == 1 and "Input/output error" in err
        assert json.loads((tmp_path / f"{verb}.json").read_text()) == found
        kept = json.loads((folder / "trimoe.json").read_text())[part]
        assert kept["command" if verb == "bench" else "commands"] and found.items() <= {**kept, "commands": found.get("commands")}.items()


def test_pages_of_others_charts() -> None:
    """What `trimoe sweep` uses."""
    table = Table(caption="Numbers", head=("name", "KL"), rows=[("a", "0.1")])
    figure = Figure(name="frontier", title="Size against KL", chart=charts.frontier([point("a", 0.5, 0.1)]), table=table)
    read = checked(page.charts_page("A sweep", [Section(name="all", title="All", blocks=[figure])]))
    assert "A sweep" in read.text and "0.1" in read.text
