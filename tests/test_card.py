"""What lies in a finished folder's record and card: put there, read back, from strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimoe import UserError
from trimoe.cli.options import check_writable, write_json
from trimoe.output import card, card_metadata
from trimoe.output.record import Record
from trimoe.show import results
from trimoe.show.form import form_of
from trimoe.version import VERSION

TEXTS: dict[str, Any] = {"model": "m", "against": "o", "length": 64, "stride": 32, "texts": [{"name": "a", "kl": 0.1}], "mean_kl": 0.1}
TASKS: dict[str, Any] = {"model": "m", "against": "o", "length": 8, "stride": 4, "texts": [], "tasks": [{"task": "t", "value": 0.5}]}


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(card, "text", lambda record: str(sorted(record.body)))
    (tmp_path / "trimoe.json").write_text('{"plan": {}}', encoding="utf-8")
    return tmp_path


def evaluated(folder: Path, report: dict[str, Any], command: str | None = None) -> None:
    card.keep(Record.read(folder).with_evaluation(report, command))


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "trimoe.json").read_text(encoding="utf-8"))["evaluation"]
    return found


@pytest.mark.parametrize("order", [(TEXTS, TASKS), (TASKS, TEXTS)])
def test_texts_and_tasks_stand_beside_each_other(order: tuple[dict[str, Any], ...], finished: Path) -> None:
    for report in order:
        evaluated(finished, report)
    assert kept(finished) == {**TEXTS, "tasks": TASKS["tasks"]}


def test_a_new_evaluation_replaces_what_it_measured_again(finished: Path) -> None:
    evaluated(finished, TEXTS)
    evaluated(finished, {**TEXTS, "length": 32, "mean_kl": 0.2})
    assert kept(finished)["length"] == 32 and kept(finished)["mean_kl"] == 0.2


def test_tasks_alone_are_recorded_and_the_card_says_that_texts_are_missing(finished: Path) -> None:
    evaluated(finished, TASKS)
    assert kept(finished) == TASKS
    assert card._quality(TASKS).startswith("Not evaluated yet")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlanguage: [en]\n---\n# A model\n", {"license": "mit", "language": ["en"]}),
        ("---\ncreated: 2024-02-30\n---\n", {}),
        ("---\na: " + "[" * 5000 + "\n---\n", {}),
        ("---\nlicense: mit\nsize: !!int ''\n---\n", {"license": "mit"}),
        ("---\nlicense: mit\n", {}),
        ("---" + "\n" * 100_000, {}),
        ("# A model\n", {}),
        ("", {}),
        ("---\nlicense: null\nlicense_name: ~\nlicense_link:\nlanguage: [en, null]\n---\n", {"language": ["en"]}),
        ("---\nlicense: NULL\nlanguage: [~, '']\n---\n", {}),
    ],
)
def test_a_source_card_gives_its_licence_or_nothing(text: str, found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert card_metadata.inherited(tmp_path) == found


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"model": "m"}', '{"model": "m", "inputs": []}'])
def test_a_damaged_record_is_a_mistake_of_the_user(record: str, tmp_path: Path) -> None:
    (tmp_path / "trimoe.json").write_text(record, encoding="utf-8")
    with pytest.raises(UserError, match=r"trimoe\.json does not read as trimoe writes it"):
        _ = Record.beside(tmp_path).origin()  # type: ignore[union-attr]
    if '"model"' not in record:
        with pytest.raises(UserError, match=r"trimoe\.json does not read as trimoe writes it"):
            Record.beside(tmp_path)


def test_results_do_not_replace_files_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    for name in (
        "config.json",
        "vocab.json",
        "added_tokens.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "trimoe.json",
    ):  # there or not
        with pytest.raises(UserError, match="is the name of a file of a model's folder"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "new.json")
    write_json(tmp_path / "eval.json", {"texts": []})
    check_writable(tmp_path / "eval.json")  # of an earlier evaluation
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "{}" and not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", "mine"),
        ("result", '{"a": 1}'),
        ("mine.json", '{"a": 1}'),
        ("trimoe.json", '{"trimoe": "0.2.0"}'),
        ("book.ipynb", '{"cells": []}'),
        ("list.json", "[1]"),
        ("broken.json", "{"),
        ("bytes.json", "\0"),
    ],
)
def test_results_replace_nothing_but_results(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is no earlier result") as caught:
        check_writable(path)
    assert "\n" not in str(caught.value) and path.read_text(encoding="utf-8") == text


def test_an_earlier_result_or_an_empty_file_is_replaced_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    path.touch()
    for value in (1, 2):
        check_writable(path)
        write_json(path, {"new": value})
        assert json.loads(path.read_text(encoding="utf-8")) == {"trimoe": VERSION, "new": value}
    (tmp_path / "made-by-mktemp").touch()
    check_writable(tmp_path / "made-by-mktemp")

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"newer": 3})
    assert json.loads(path.read_text(encoding="utf-8")) == {"trimoe": VERSION, "new": 2}


def test_results_go_to_files(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "folder.json", Path("/dev/null"), tmp_path / "absent" / "a.json"):
        with pytest.raises(UserError, match="give a file in a folder that exists"):
            check_writable(path)


def test_an_evaluation_says_by_which_command_it_was_made(finished: Path) -> None:
    evaluated(finished, TEXTS, "trimoe eval a")
    evaluated(finished, TASKS, "trimoe eval b --tasks t")
    assert kept(finished)["commands"] == {"texts": "trimoe eval a", "tasks": "trimoe eval b --tasks t"}
    evaluated(finished, {**TEXTS, "mean_kl": 0.2})
    assert kept(finished)["commands"] == {"tasks": "trimoe eval b --tasks t"}, "a command that the numbers are not of is not kept"


def test_cards_of_damaged_records_are_one_sentence(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", '{"plan": {}, "calibration": {}, "model": "m", "recipe": {"steps": []}}'):
        (tmp_path / "trimoe.json").write_text(text, encoding="utf-8")
        for act in (card.refresh, card.check, lambda record: card.keep(record.with_evaluation(TEXTS))):
            with pytest.raises(UserError, match=r"trimoe\.json") as caught:
                act(Record.read(tmp_path))
            assert "\n" not in str(caught.value)
        assert not (tmp_path / "README.md").exists() and (tmp_path / "trimoe.json").read_text(encoding="utf-8") == text


PLAN: dict[str, Any] = {
    "form": "stock",
    "loads_in": {},
    "layers": [{"layer": 0, "experts": 8, "kept": 8, "rank": None, "bits": None, "sparsity": None}],
}


@pytest.mark.parametrize(
    ("form", "changes", "head", "words"),
    [
        ("stock", {"kept": 6}, "| layer | experts before | after |", "stock"),
        ("stock", {"bits": 4}, "| layer | experts | bits of a weight |", "compressed-tensors"),
        ("stock", {"bits": 8, "kept": 6}, "| layer | experts before | after | bits of a weight |", "compressed-tensors"),
        ("stock", {"sparsity": "2:4"}, "| layer | experts | zeros |", "stock"),
        ("native", {"rank": "3 / 4", "kept": 6}, "| layer | experts before | after | mean rank, first / last projection |", "native"),
        (
            "native",
            {"bits": 4, "kept": 0, "gone": "moe"},
            "| layer | experts before | after | bits of a weight |",
            "native with compressed-tensors",
        ),
    ],
)
def test_what_a_result_is_and_the_columns_that_apply(form: str, changes: dict[str, Any], head: str, words: str) -> None:
    row = PLAN["layers"][0] | changes
    plan = PLAN | {"form": form, "layers": [row], "loads_in": {"vllm": "made for it, not tried (compressed-tensors)"}}
    assert form_of(plan) == words
    shown = card._layers(plan["layers"])
    assert shown.splitlines()[0] == head and len(shown.splitlines()) == 3
    said = card._loading(plan)
    assert ("is a stock checkpoint" in said) == (words == "stock") and ("import trimoe" in said) == (form == "native")
    assert ("pip install compressed-tensors" in said) == ("compressed" in words) and ("vLLM" in said) == (words == "compressed-tensors")


def test_numbers_have_three_digits() -> None:
    assert [results.three(value) for value in (2.0, 4.066, 12.34, 99.96, 99.94, 1234.5, 0.01234, 9.999)] == [
        "2.00", "4.07", "12.3", "100", "99.9", "1,234", "0.0123", "10.0"
    ]  # fmt: skip


def test_a_saving_of_nothing_has_no_sign() -> None:
    one = {"bytes_per_token": 100_000.0, "imbalance": {"mean": 1.0, "worst": 1.0}}
    assert results.traffic_cells([one, one | {"bytes_per_token": 100_004.0}])[2] == "0.0%"
    assert results.traffic_cells([one, one | {"bytes_per_token": 103_000.0}])[2] == "-3.0%"


def test_names_in_tables_are_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ends = {"kl": [0.04781, 0.08123], "perplexity": [68.9123, 101.2345], "against_perplexity": [60.1, 70.2], "agreement": [0.8, 0.9]}
    row = {"name": "[/x]", "tokens": 64, "perplexity": 80.5, "against": {"perplexity": 65.25}, "kl": 0.0612, "agreement": 0.85,
           "intervals": ends, "resampled": "documents"}  # fmt: skip
    results.evaluation({"model": "m[v2]", "against": "o", "length": 64, "stride": 32, "texts": [row]})
    shown = capsys.readouterr().out
    assert "m[v2]" in shown and "[/x]" in shown
    assert "0.0478-0.0812" in shown and "68.912-101.234" in shown and "80.0-90.0%" in shown
    row |= {"perplexity": 123456789.0, "intervals": {**ends, "perplexity": [12345678.9, 1234567891.2], "kl": [10.12, 15.12]}}
    results.evaluation({"model": "m", "against": "o", "length": 64, "stride": 32, "texts": [row]})
    shown = capsys.readouterr().out
    assert "123456789.000" in shown and "[/x]" in shown and "…" not in shown and "85.0%" in shown, "intervals go before a number breaks"


def test_names_do_not_speak_in_the_model_card() -> None:
    name = "</script>`x`\n---\n# [a](http://b)|"
    assert card._escaped(name) == "\\</script\\>\\`x\\` --- # \\[a\\](http://b)\\|"
    assert card._code(name) == "`` </script>`x` --- # [a](http://b)| ``"
    assert card._fenced("a\n```\nb").splitlines()[0] == "````"
