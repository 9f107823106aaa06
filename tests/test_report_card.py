"""The model card of results, and what evaluations and benchmarks leave in the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import SMALL, everything
from refusals import Line

import trimoe
from trimoe.output import card, card_metadata
from trimoe.output.record import Record
from trimoe.progress import LOG

pytest.importorskip("altair")
pytest.importorskip("vl_convert")


Family = Callable[[str], Path]
pytestmark = pytest.mark.xdist_group("pages")  # on one worker, which makes the folders once


def test_the_card_says_what_the_hub_reads(made: Callable[[str], Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    record = json.loads((made("moe-i2") / "trimoe.json").read_text())
    data = ModelCard(card.text(Record(tmp_path, record))).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation" and data.base_model is None
    assert {"trimoe", "expert_drop", "low_rank"} <= set(data.tags)
    metrics = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert metrics["letters", "kl"] == pytest.approx(record["evaluation"]["texts"][0]["kl"], abs=1e-6)
    given = record | {"model": "mistralai/Mixtral-8x7B-v0.1", "source_card": {"license": "apache-2.0", "language": ["en", "fr"]}}
    data = ModelCard(card.text(Record(tmp_path, given))).data
    assert (data.base_model, data.base_model_relation, data.license, data.language) == (
        given["model"],
        "finetune",
        "apache-2.0",
        ["en", "fr"],
    )
    packed = json.loads((made("slim-int4") / "trimoe.json").read_text()) | {"model": "a/b"}
    assert ModelCard(card.text(Record(tmp_path, packed))).data.base_model_relation == "quantized"
    hostile = record | {"model": "a: [b\n---\n# c"}
    hostile["evaluation"]["texts"][0]["name"] = "x: {\n---"
    parsed = yaml.safe_load(card.text(Record(tmp_path, hostile)).split("\n---\n")[0].removeprefix("---\n"))
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
        assert card_metadata.inherited(source) == {}


def test_benchmarks_of_the_original_are_kept(
    made: Callable[[str], Path], family_folder: Family, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = everything(made("naee"), tmp_path)
    bench = json.loads((folder / "trimoe.json").read_text())["bench"]
    shutil.copyfile(made("naee") / "trimoe.json", folder / "trimoe.json")
    monkeypatch.setattr(trimoe, "bench", lambda *args, **kwargs: bench)
    monkeypatch.setattr("trimoe.show.results.bench", lambda report: None)
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
        monkeypatch.setattr(f"trimoe.show.results.{'bench' if verb == 'bench' else 'evaluation'}", gone)
        code, _, err = line.run(verb, folder, "--against", family_folder("mixtral"), "-q", "--json", tmp_path / f"{verb}.json")
        assert code == 1 and "Input/output error" in err
        assert f"trimoe {verb} " in (folder / LOG).read_text().splitlines()[-3], "in the folder's log, too"
        assert json.loads((tmp_path / f"{verb}.json").read_text()) == {"trimoe": trimoe.__version__, **found}
        kept = json.loads((folder / "trimoe.json").read_text())[part]
        assert kept["command" if verb == "bench" else "commands"] and found.items() <= {**kept, "commands": found.get("commands")}.items()
