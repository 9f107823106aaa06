"""A sweep: what is refused before anything runs, one statistics pass, going on, what is kept."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import trimoe
from trimoe import cli
from trimoe.calibration.statistics import Stats
from trimoe.errors import UserError
from trimoe.evaluate import texts
from trimoe.evaluate.texts import Ends
from trimoe.output.record import Record
from trimoe.plan import disk
from trimoe.progress import LOG, Reporter
from trimoe.recipe import recipe as recipes
from trimoe.sweep import rows as standings
from trimoe.sweep.grid import variants

Families = Callable[[str], Path]
DROP: dict[str, Any] = {"steps": [{"expert_drop": {"ratio": [0.25, 0.5], "score": ["gate", "reap"], "counts": "uniform"}}]}
NAMES = ["ratio-0.25_score-gate", "ratio-0.25_score-reap", "ratio-0.5_score-gate", "ratio-0.5_score-reap"]


class Calls:
    """Counts what the sweep asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        import trimoe.sweep.sweep  # noqa: F401 (the module, which the function of the same name hides)

        self.seen: list[str] = []
        for name, where in (("statistics", "trimoe.sweep.statistics"), ("evaluate", "trimoe.sweep.sweep")):
            module = sys.modules[where]
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.seen.append(name)
            return real(*args, **options)

        return call


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, family_folder: Families, text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "out"
    run(family_folder("mixtral"), out, text_file)
    return out


def run(model: Path, out: Path, letters: Path, recipe: Any = DROP, **options: Any) -> trimoe.Sweep:
    given = {"calibration": [str(letters)], "samples": 8, "length": 16, "text": [str(letters)], "tokens": 64, "window": 16}
    return trimoe.sweep(model, recipe, out, **{**given, **options})


def test_a_sweep_leaves_numbers_and_recipes_and_no_weights(swept: Path) -> None:
    rows = json.loads((swept / "sweep.json").read_text())
    table = list(csv.DictReader((swept / "sweep.csv").open()))
    assert rows["pending"] == [] and [entry["name"] for entry in rows["variants"]] == NAMES == [line["variant"] for line in table]
    assert [line["ratio"] for line in table] == ["0.25", "0.25", "0.5", "0.5"] and {line["kept"] for line in table} == {""}
    sizes = [entry["bytes"] for entry in rows["variants"]]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]
    assert all(entry["frontier"] == (line["frontier"] == "yes") for entry, line in zip(rows["variants"], table, strict=True))
    assert {path.name for path in (swept / "ratio-0.5_score-reap").iterdir()} == {"trimoe.json", LOG}
    logs = [(folder / LOG).read_text() for folder in (swept, swept / "ratio-0.5_score-reap")]
    assert all("trimoe.sweep of " in logs[0] and f"{name}: " in logs[0] for name in NAMES) and "GiB of memory" in logs[0].splitlines()[-1]
    assert "Write: done in" in logs[1] and "Compare: done in" in logs[0], "what was made is in the variant's log, the rest in the sweep's"
    again = recipes.load(str(swept / "ratio-0.5_score-reap.yaml"))
    assert again.steps[0].ratio == 0.5 and again.steps[0].score == "reap" and again.calibration.samples == 8  # type: ignore[union-attr]


def test_the_frontier_is_drawn(swept: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    page = (swept / "sweep.html").read_text()
    assert all(name in page for name in NAMES) and (swept / "figures" / "frontier.svg").read_text().startswith("<svg")


FEW: dict[str, Any] = {"calibration": {"search_tokens": 128, "search_memory": 0.00008}}  # GiB: fewer tokens fit the further one reaches


@pytest.mark.parametrize(
    ("recipe", "name", "passes"),
    [
        (
            {"steps": [{"expert_drop": {"count": [1, 6], "counts": "uniform", "search": "greedy"}}, {"low_rank": {"ratio": 0.3}}], **FEW},
            "count-1",
            0,
        ),
        ({"steps": [{"expert_drop": {"ratio": 0.25, "score": ["gate", "leave_one_out"], "counts": "uniform"}}]}, "score-gate", 1),
        ({"steps": [{"expert_drop": {"ratio": 0.25, "search": ["greedy", "none"]}}], **FEW}, "search-greedy", 1),
    ],
    ids=["reach", "search", "shared"],
)
def test_a_variant_is_what_compress_makes(
    recipe: dict[str, Any],
    name: str,
    passes: int,
    family_folder: Families,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte, the record too; where the memory for search tokens binds as well."""
    with monkeypatch.context() as patch:
        calls = Calls(patch)
        run(family_folder("mixtral"), tmp_path / "out", text_file, recipe, keep="all")
    assert calls.seen.count("statistics") == passes
    trimoe.compress(family_folder("mixtral"), str(tmp_path / "out" / f"{name}.yaml"), tmp_path / "alone")
    made = tmp_path / "out" / name
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert path.read_bytes() == (made / path.name).read_bytes()
    swept, alone = (json.loads((folder / "trimoe.json").read_text()) for folder in (made, tmp_path / "alone"))
    for record in (swept, alone):
        record.pop("command"), record.pop("evaluation", None)
    assert swept == alone


def test_one_statistics_pass_for_all(family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    recipe = {
        "steps": [[{"expert_drop": {"ratio": 0.25, "counts": "uniform"}}, {"layer_drop": {"count": 1}}, {"quantize": {"method": "round"}}]]
    }
    found = run(family_folder("mixtral"), tmp_path / "out", text_file, recipe)
    assert calls.seen == ["statistics", "evaluate", "evaluate", "evaluate"] and [row.method for row in found.rows][2] == "quantize"
    searching = [bool(Stats.load(file).layers[0].search) for file in (tmp_path / "out").glob("statistics-*.safetensors")]
    assert sorted(searching) == [False, True]


def test_the_original_is_walked_once_and_the_numbers_are_those_of_evaluate(
    family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, traffic included; and where its hidden states would be too many to be kept."""
    walked: list[str] = []
    real = texts._final_hidden

    def walk(skeleton: Any, *rest: Any) -> Any:
        walked.append(skeleton.name)
        return real(skeleton, *rest)

    monkeypatch.setattr(texts, "_final_hidden", walk)
    model = family_folder("mixtral")
    done = run(model, tmp_path / "out", text_file, keep="all")
    assert walked.count(str(model)) == 1 and len(walked) == 5
    for row in done.rows:
        folder = done.out / row.name
        alone = trimoe.evaluate(folder, against=model, text=[str(text_file)], tokens=64, length=16)
        kept = json.loads((folder / "trimoe.json").read_text())["evaluation"]
        assert {name: kept[name] for name in alone} == json.loads(json.dumps(alone))
    walked.clear()
    monkeypatch.setattr(sys.modules["trimoe.sweep.sweep"], "HELD", 0)
    again = run(model, tmp_path / "again", text_file)
    assert walked.count(str(model)) == 4 and [row.kl for row in again.rows] == [row.kl for row in done.rows]


def test_another_text_or_original_is_walked_again(family_folder: Families, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, models = Ends(), [family_folder("mixtral"), family_folder("olmoe")]

    def evaluated(against: Path, tokens: int, ends: Ends | None) -> Any:
        return trimoe.evaluate(models[0], against=against, text=[str(text_file)], tokens=tokens, length=16, ends=ends)

    for against, tokens in ((models[0], 64), (models[1], 64), (models[1], 32), (models[1], 32), (models[0], 64)):
        assert evaluated(against, tokens, ends) == evaluated(against, tokens, None)


def test_a_sweep_goes_on_and_grows(
    swept: Path, family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "out", family_folder("mixtral")

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(standings.Row, "of", killed)  # after the first variant's evaluation was stored
        with pytest.raises(KeyboardInterrupt):
            run(model, out, text_file)
    calls = Calls(monkeypatch)
    done = run(model, out, text_file)
    assert calls.seen == ["evaluate"] * 3
    assert [(row.name, row.kl) for row in done.rows] == [
        (e["name"], e["kl"]) for e in json.loads((swept / "sweep.json").read_text())["variants"]
    ]
    calls.seen.clear()
    more = {"steps": [{"expert_drop": {"ratio": [0.25, 0.5], "score": ["gate", "reap", "frequency"], "counts": "uniform"}}]}
    assert len(run(model, out, text_file, more).rows) == 6 and calls.seen == ["evaluate"] * 2
    other = {"steps": [{"expert_drop": {"ratio": [0.25, 0.5], "score": ["gate", "reap"], "counts": "importance"}}]}
    with pytest.raises(UserError, match="holds a result of the same name and another recipe"):
        run(model, out, text_file, other)
    with pytest.raises(UserError, match="holds a sweep with another evaluation; repeat its command"):
        run(model, out, text_file, tokens=65)
    said: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda _, message: said.append(message))
    assert len(run(model, out, text_file, reporter=Reporter("quiet")).rows) == 4
    assert any("holds 2 variants of other lists, too" in line and "(ratio-0.25_score-frequency, " in line for line in said), said
    with pytest.raises(UserError, match=r"no finished trimoe folder but a sweep's: .*sweep\.html compares"):
        Record.finished(out)


def test_what_is_kept_can_be_changed_afterwards(
    family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "out", family_folder("mixtral")
    calls = Calls(monkeypatch)
    first = run(model, out, text_file, keep="frontier")
    weights = {path.parent.name for path in out.glob("*/*.safetensors")}
    assert weights == {row.name for row in first.best} == {row.name for row in first.rows if row.kept} and 0 < len(weights) < 4
    trimoe.load(out / first.best[0].name)
    everything = run(model, out, text_file, keep="all")
    assert {path.parent.name for path in out.glob("*/*.safetensors")} == set(NAMES)
    assert [row.kl for row in everything.rows] == [row.kl for row in first.rows] and calls.seen.count("evaluate") == 4
    assert "| letters |" in (out / first.rows[0].name / "README.md").read_text()
    next((out / NAMES[0]).glob("*.safetensors")).unlink()
    assert all(row.kept for row in run(model, out, text_file, keep="all").rows) and list((out / NAMES[0]).glob("*.safetensors"))
    run(model, out, text_file, keep="none")
    assert not list(out.glob("*/*.safetensors"))


@pytest.mark.parametrize("ratios", [[0.25, 0.5], [0.25]], ids=["one of two", "all"])
def test_a_variant_without_a_number_has_failed_every_time(
    ratios: list[float], family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model, out = sys.modules["trimoe.sweep.sweep"], family_folder("mixtral"), tmp_path / "out"
    real, nan = module.evaluate, float("nan")

    def broken(folder: Path, **options: Any) -> Any:
        report = real(folder, **options)
        return report if "0.5" in folder.name else {**report, "mean_kl": nan, "texts": [{**text, "kl": nan} for text in report["texts"]]}

    monkeypatch.setattr(module, "evaluate", broken)
    recipe = {"steps": [{"expert_drop": {"ratio": ratios, "counts": "uniform", "score": "gate"}}]}
    for _ in range(2):
        with pytest.raises(UserError, match=f"1 of {len(ratios)} variants failed: .*: its KL to the original is nan"):
            run(model, out, text_file, recipe, keep="frontier")
        assert not list(out.glob("*0.25*/*.safetensors")) and len(list(out.glob("*/*.safetensors"))) == len(ratios) - 1

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads((out / "sweep.json").read_text(), parse_constant=refuse)["variants"]
    assert found[0]["kl"] is None and not found[0]["frontier"] and next(iter(found[0]["texts"].values()))["kl"] is None


def test_every_impossible_variant_is_named_before_anything_is_written(family_folder: Families, text_file: Path, tmp_path: Path) -> None:
    wrong = {"steps": [{"expert_drop": {"ratio": [0.25, 0.9, 0.95], "counts": "uniform"}}]}
    with pytest.raises(UserError, match=r"2 of 3 variants are not possible") as said:
        run(family_folder("mixtral"), tmp_path / "out", text_file, wrong)
    assert "ratio-0.9:" in str(said.value) and "ratio-0.95:" in str(said.value) and not (tmp_path / "out").exists()
    empty, one, nul = (tmp_path / f"{name}.txt" for name in ("empty", "one", "nul"))
    empty.write_text("\n")
    one.write_text("x")
    nul.write_text("x\0y")
    for options, words in (
        ({"keep": "best"}, "none, frontier, all"),
        ({"text": ["no.txt"]}, "There is no text file"),
        ({"text": []}, "give at least one"),
        ({"text": [str(empty)]}, "no document of at least 2 tokens"),
        ({"text": [str(text_file), str(one)]}, "'one' has no document of at least 2 tokens"),
        ({"text": [str(nul)]}, "NUL bytes"),
        ({"tokens": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            run(family_folder("mixtral"), tmp_path / "out", text_file, **options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        run(family_folder("mixtral"), tmp_path / "full", text_file)


def test_disk_is_checked_for_what_is_kept(
    family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["trimoe.sweep.sweep"], "HELD", 0)
    plans = [trimoe.plan(family_folder("mixtral"), variant.recipe()) for variant in variants([DROP])]
    shared = max(plan.disk_split[disk.STATISTICS] for plan in plans)  # one file, for they are of the same text and search alike
    usage = type(shutil.disk_usage(tmp_path))(1 << 40, 0, max(plan.disk for plan in plans) + shared)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="of disk"):
        run(family_folder("mixtral"), tmp_path / "out", text_file, keep="all")
    assert not (tmp_path / "out").exists()
    assert len(run(family_folder("mixtral"), tmp_path / "out", text_file).rows) == 4


def test_disk_is_checked_for_what_is_still_to_be_made(
    family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished takes its room already and gives none to what is added; what a killed variant left does."""
    model, out = family_folder("mixtral"), tmp_path / "out"

    def drops(*ratios: float) -> dict[str, Any]:
        return {"steps": [{"expert_drop": {"ratio": list(ratios), "counts": "uniform", "score": "gate"}}]}

    run(model, out, text_file, drops(0.25, 0.375), keep="all")
    added = trimoe.plan(model, variants([drops(0.5)])[0].recipe(), samples=8, length=16)
    free, usage = [0], type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, free[0]))
    assert len(run(model, out, text_file, drops(0.25, 0.375), keep="all").rows) == 2, "nothing is to be made, so no room is needed"
    free[0] = 2 * added.disk
    with pytest.raises(UserError, match="The result needs"):  # of two that are new the original's hidden states are kept in files, too
        run(model, out, text_file, drops(0.25, 0.375, 0.5, 0.51), keep="all")
    free[0] = added.disk - 1
    with pytest.raises(UserError, match="The result needs"):
        run(model, out, text_file, drops(0.25, 0.375, 0.5), keep="all")
    assert not (out / "ratio-0.5").exists()
    free[0] += 1
    assert len(run(model, out, text_file, drops(0.25, 0.375, 0.5), keep="all").rows) == 3
    free[0] = 2 * max(row.bytes for row in run(model, out, text_file, drops(0.25, 0.375, 0.5), keep="none").rows)
    with pytest.raises(UserError, match="The result needs"):
        run(model, out, text_file, drops(0.25, 0.375, 0.5), keep="all")


def test_the_command_of_a_variant_makes_it(
    family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as a shell reads it: from the folder in which the sweep was started, whatever is in the names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").symlink_to(family_folder("mixtral"))
    recipe = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "score": ["gate", "reap"]}}]}
    run(Path("my model"), Path("it's here/out"), text_file, recipe, seed=3, dtype="bfloat16")
    made = tmp_path / "it's here" / "out" / "score-reap"
    command = shlex.split(json.loads((made / "trimoe.json").read_text())["command"])
    assert command[:3] == ["trimoe", "compress", "my model"] and command[-6:] == ["--seed", "3", "--device", "cpu", "--dtype", "bfloat16"]
    again = Path(command[command.index("--out") + 1])
    assert {path.name for path in made.iterdir()} == {"trimoe.json", LOG}, "the weights have gone, the record has stayed"
    result = CliRunner().invoke(cli.app, [*command[1:], "--quiet"])
    assert result.exit_code == 0, result.output
    assert again == Path("it's here/out-score-reap")
    decided = [json.loads((folder / "trimoe.json").read_text())["decisions"] for folder in (made, again)]
    assert decided[0] == decided[1] and list(again.glob("*.safetensors"))


def test_without_the_plotting_libraries_all_but_the_plot_is_there(
    family_folder: Families, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trimoe.report.charts", None)
    said: list[str] = []

    class Listens(trimoe.progress.Reporter):  # type: ignore[name-defined]
        def say(self, message: str) -> None:
            said.append(message)

    run(
        family_folder("mixtral"),
        tmp_path / "out",
        text_file,
        {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform"}}]},
        reporter=Listens(),
    )
    assert (tmp_path / "out" / "sweep.csv").is_file() and not (tmp_path / "out" / "sweep.html").exists()
    assert [line for line in said if "pip install 'trimoe[report]'" in line] and len(said) < 12
