"""The report: every recipe's result has its page, which is safe and complete."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from pages import RECIPES, SMALL, checked, everything

import trimoe
from trimoe.output import card

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from trimoe.methods import evidence
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.output.record import Record
from trimoe.plan import size_by_part
from trimoe.report import build, charts, chosen, page, size
from trimoe.report.section import Code, Figure, Section
from trimoe.show import format
from trimoe.show.table import Table

Family = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("pages")  # on one worker, which makes the folders once
ALWAYS = {"summary", "quality", "traffic", "size", "decisions", "origin"}
SHARED = ("qwen2_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe")  # have shared experts


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


def test_what_evaluations_add_is_shown(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = everything(made("moe-i2"), tmp_path)
    read = checked(build.report([folder], tmp_path / "page.html")[0].read_text())
    assert {"tasks-section", "generation", "speed"} <= {attributes["id"] for attributes in read.all("section")}
    assert "(0.1000 to 0.2000)" in read.text and "0.6000 \N{PLUS-MINUS SIGN} 0.0100" in read.text and "2.00x" in read.text
    card.refresh(Record.read(folder))
    text = (folder / "README.md").read_text()
    assert "## Tasks" in text and "## Speed" in text and "(0.1000 to 0.2000)" in text


def values_of(figure: Figure) -> list[dict[str, Any]]:
    """What its chart is drawn from."""
    (values,) = figure.chart.to_dict()["datasets"].values()
    return list(values)


def test_greedy_and_sampled_are_told_apart(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = everything(made("moe-i2"), tmp_path)
    section = next(section for section in build.full(Record.finished(folder)) if section.name == "generation")
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
    record = json.loads((folder / "trimoe.json").read_text())
    found = record["metrics"]["0.expert_drop"]["warnings"]  # what only the run itself knows
    assert len(found) == 2 and "experts saw fewer than 128 calibration tokens" in found[0]
    warnings = record["plan"]["warnings"] + found
    page = build.report([folder], tmp_path / "page.html")[0].read_text()
    assert len(warnings) > 1 and checked(page)
    listed = re.findall(r"<li>([^<]*)</li>", page.partition('class="warnings"')[2].partition("</div>")[0])
    assert [html.unescape(entry) for entry in listed] == warnings


def test_on_how_much_text_it_was_decided(made: Callable[[str], Path], tmp_path: Path) -> None:
    """The page and the card say what the record does, too few search tokens of an expert among it."""
    folder = made("naee")
    record = json.loads((folder / "trimoe.json").read_text())
    found = record["metrics"]["0.expert_drop"]
    search = found["measured_on"]["search"]
    every = {index: row["search_tokens_per_expert"] for index, row in found["layers"].items()}
    few = {index: [count for count in counts if count < 64] for index, counts in every.items()}
    assert search["fewer"] == {index: {"experts": len(counts), "least": min(counts)} for index, counts in few.items() if counts} != {}
    (table,) = [block for block in chosen._decisions(Record.finished(folder)).blocks if "how much text" in block.caption]
    rows = {row[0].partition(": ")[2]: row for row in table.rows}
    assert rows["statistics"][1:3] == (str(record["calibration"]["samples"]), f"{found['measured_on']['statistics']['tokens']:,}")
    least, total = min(map(min, every.values())), sum(map(len, few.values()))
    assert f"{least:,} at least; {total} by fewer than 64 (layer " in rows["search"][3]
    page = build.report([folder], tmp_path / "page.html")[0].read_text()
    assert html.escape(rows["search"][3]) in page and f"{total} by fewer than 64" in (folder / "README.md").read_text()
    assert evidence.fewer({"enough": 64, "fewer": {}}) == "" and evidence.rows({}) == []
    many = {str(index): {"experts": index + 1, "least": 9 - index} for index in range(6)}
    assert evidence.fewer({"enough": 64, "fewer": many}) == (
        "; 21 by fewer than 64 (layer 3: 4, down to 6; layer 4: 5, down to 5; layer 5: 6, down to 4; in all in layers 0-5)"
    )


def test_how_it_was_measured_is_said(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = everything(made("moe-i2"), tmp_path)
    titles = {block.title: block.text for block in size.origin(Record.finished(folder)).blocks if isinstance(block, Code)}
    assert titles["To measure texts and generation"] == "trimoe eval THIS" and titles["To measure tasks"] == "trimoe eval THAT"
    record = json.loads((folder / "trimoe.json").read_text())
    record["evaluation"]["commands"] = {"texts": record["command"]}
    record["bench"]["command"] = "trimoe bench"
    (folder / "trimoe.json").write_text(json.dumps(record))
    assert [block.title for block in size.origin(Record.finished(folder)).blocks if isinstance(block, Code)] == [
        "Command",
        "To measure speed",
        "Recipe",
    ]


def test_numbers_have_the_same_digits() -> None:
    assert [format.short(count, format.COUNTS) for count in (2_000_000, 4_066_000, 999_600, 72_000, 812, 46_700_000_000)] == [
        "2.00M", "4.07M", "1.00M", "72.0K", "812", "46.7B"
    ]  # fmt: skip


@pytest.mark.parametrize("family", families.FAMILIES)
def test_bytes_by_part(family: str, family_folder: Family) -> None:
    """Every tensor is in a part, the same before and after where nothing changes, and the parts are where one would look for them."""
    skeleton = Skeleton.of(str(family_folder(family)))
    made = size_by_part.parts(Layout(skeleton, unchanged(skeleton.sites)))
    assert all(before == after for place in (made["outside the layers"], *made["layers"].values()) for before, after in place.values())
    assert list(made["outside the layers"]) == ["embedding", "norms", "head"]
    for index, sizes in made["layers"].items():
        assert list(sizes) == [part for part in format.PARTS if part in sizes]
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
        section = size.size(Record.finished(folder))
        figure = next(block for block in section.blocks if isinstance(block, Figure) and block.name == "size-parts")
        rows = values_of(figure)
        assert list(dict.fromkeys(row["model"] for row in rows)) == ["compressed", "original"]
        assert [row["part"] for row in rows if row["model"] == "original"] == [row["part"] for row in rows if row["model"] == "compressed"]
        return [row[0] for row in figure.table.rows]

    folder = Path(shutil.copytree(made("layer-drop"), tmp_path / "copy"))
    assert shown(folder) == ["embedding", "attention", "routers", "routed experts", "norms", "head", "other"]


def test_two_steps_of_one_kind(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    """Their sections and figures have names of their own, and each section says which step it is on."""
    step = {"expert_drop": {"ratio": 0.125, "counts": "optimal", "search": "greedy"}}
    trimoe.compress(family_folder("mixtral"), {"steps": [step, step]}, tmp_path / "out", calibration=[str(text_file)], **SMALL)
    page = build.report([tmp_path / "out"], tmp_path / "page.html")[0].read_text()
    found = checked(page)
    drawn = {attributes.get("data-chart") for attributes in found.all("div")}
    assert {"search", "search-2"} <= {attributes.get("id") for attributes in found.all("section")}
    assert {"search-losses", "search-losses-2"} <= drawn
    assert "The search for which experts go: step 2, expert_drop" in page
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
    assert len(charts.frontier(points, alike=False).to_dict()["layer"]) == 3
    narrow = charts.frontier([point("a", 0.5, 0.1), point("b", 0.5000001, 0.2)]).to_dict()
    low, high = narrow["layer"][-1]["encoding"]["x"]["scale"]["domain"]
    assert low < 0.5 < high and high - low == pytest.approx(charts.NARROW)
    assert "log" in json.dumps(charts.frontier([point("a", 0.5, 0.001), point("b", 0.6, 1.0)]).to_dict())


def test_pages_of_others_charts() -> None:
    """What `trimoe sweep` uses."""
    table = Table(caption="Numbers", head=("name", "KL"), rows=[("a", "0.1")])
    figure = Figure(name="frontier", title="Size against KL", chart=charts.frontier([point("a", 0.5, 0.1)]), table=table)
    read = checked(page.charts_page("A sweep", [Section(name="all", title="All", blocks=[figure])]))
    assert "A sweep" in read.text and "0.1" in read.text
