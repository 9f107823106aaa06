"""What plan and inspect show: tables, JSON, which engines, warnings, disk."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from refusals import Line
from safetensors.torch import load_file, save_file

import trimoe
from trimoe.calibration import gather
from trimoe.checkpoint import free_disk
from trimoe.errors import UserError
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop.options import Greedy
from trimoe.model.skeleton import Skeleton
from trimoe.plan import disk, engines, inspection
from trimoe.plan.limits import IMPORTS
from trimoe.plan.plan import Plan
from trimoe.recipe.recipe import load
from trimoe.show import plan as plan_table
from trimoe.show.answer import Answer
from trimoe.show.table import console
from trimoe.walk import hidden_states

Family = Callable[[str], Path]
DROP = {"expert_drop": {"count": 2, "counts": "uniform", "search": "greedy"}}
MANY = {"calibration": {"samples": 4096, "length": 64}}


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Line:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Line(monkeypatch, capsys)


def words(folder: Path, **recipe: Any) -> list[str]:
    return trimoe.plan(str(folder), {**MANY, **recipe}).warnings


def test_table_and_json_say_the_same(family_folder: Family, line: Line) -> None:
    folder = str(family_folder("deepseek_v2"))
    code, shown, _ = line.run("plan", folder, "--recipe", "expert-drop-int4", "--set", "steps.1.group=8", "--samples", "512")
    assert code == 0 and all(len(row) <= 80 for row in shown.splitlines()) and "\x1b" not in shown
    code, text, _ = line.run("plan", folder, "--recipe", "expert-drop-int4", "--set", "steps.1.group=8", "--samples", "512", "--json")
    body = json.loads(text)
    assert code == 0 and f"{body['after']['file_bytes']:,}" in shown and f"{body['after']['active']:,}" in shown
    assert plan_table.short(body["after"]["flops"]) in shown and plan_table.human(body["after"]["cache_bytes"]) in shown
    assert all(answer.split()[0] in shown for answer in body["loads_in"].values())
    assert {row["layer"] for row in body["layers"]} == {1, 2} and body["dense_layers"]["count"] == 1 and "1 dense" in shown
    assert all(row["bits"] == 4 and row["kept"] == 6 and "4 bits" in shown and "8 -> 6" in shown for row in body["layers"])
    assert [row["stage"] for row in body["passes"]] == ["Statistics, step 1", "Quantise and write"]
    assert body["passes"][0]["written_bytes"] == 0 < body["passes"][1]["written_bytes"] < body["after"]["file_bytes"]
    assert "Quantise and write" in shown and plan_table.human(body["passes"][0]["read_bytes"]) in shown
    beside = {name: body.pop(name) for name in ("passes", "traffic")}
    assert Plan.from_json(body).to_json() == body and beside["traffic"] is None


@pytest.mark.parametrize("width", [80, 60, 50, 40])
def test_numbers_are_whole_where_there_is_little_room(width: int) -> None:
    plan = trimoe.plan("builtin:mini-mixtral", "moe-i2").to_json()
    file = io.StringIO()
    console(file, width=width).print(plan_table.of_plan(plan))
    shown, (low, high) = file.getvalue(), (f"{plan['after'][key]:,}" for key in ("least_bytes", "file_bytes"))
    assert f"{low} to {high}" in shown and "tensor bytes" in " ".join(shown.split())
    assert (f"{plan['before']['file_bytes']:,}" in shown) == (width > 40)
    assert ("params" in shown) == (" pa" in shown) == (width > 40)  # a column is there or not


def test_one_text_and_one_change_need_no_list(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    """A string is one of them, not its letters; in the record, too."""
    options = {"samples": 4, "length": 16, "changes": "steps.0.ratio=0.5", "calibration": str(text_file)}
    made = trimoe.compress(str(family_folder("mixtral")), "expert-drop", tmp_path / "out", **options)
    command = json.loads((tmp_path / "out" / "trimoe.json").read_text())["command"]
    assert made.plan.recipe["calibration"]["data"] == [str(text_file)] and "changes=['steps.0.ratio=0.5']" in command
    assert f"calibration=[{str(text_file)!r}]" in command
    with pytest.raises(UserError, match=r"include .* is not a folder"):
        trimoe.evaluate(str(family_folder("mixtral")), text=[], tasks="quiz", include=tmp_path / "absent")


def test_what_is_measured_stays_out_of_the_record(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    made = trimoe.compress(
        str(family_folder("mixtral")), {"steps": [DROP]}, tmp_path / "out", calibration=[str(text_file)], samples=6, length=32
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "trimoe.json").read_text())
    assert "passes" not in record["plan"] and record["plan"] == json.loads(json.dumps(made.plan.to_json()))
    assert made.plan.after.exact and str(made.plan).startswith(str(family_folder("mixtral")))


def test_a_device_that_is_not_here(family_folder: Family, line: Line) -> None:
    code, shown, _ = line.run(
        "plan", str(family_folder("mixtral")), "--recipe", "slim-int4", "--set", "steps.0.group=8", "--device", "cuda:7"
    )
    assert code == 0 and "memory of the device" in shown


def test_inspect(family_folder: Family) -> None:
    about = inspection.inspect(str(family_folder("qwen3_next")))
    assert about["cache"] == [
        {"layers": 2, "keeps": "state", "token_bytes": 0, "state_bytes": about["cache"][0]["state_bytes"], "window": None},
        {"layers": 1, "keeps": "all tokens", "token_bytes": 2 * 2 * 8 * 4, "state_bytes": 0, "window": None},
    ]
    assert about["size"]["cache_bytes"] == 1000 * 128 + about["size"]["state_bytes"] and about["size"]["state_bytes"] > 0
    shown = inspection.table(about)
    assert all(len(row) <= 80 for row in shown.splitlines()) and "1 layers: all tokens" in " ".join(shown.split())
    assert f"{about['size']['parameters']:,}" in shown and len(about["costs"]) == about["layers"]


# ---- engines


def test_why_an_engine_does_not_load_it(family_folder: Family, tmp_path: Path) -> None:
    def answers(*steps: dict[str, Any], family: str = "mixtral") -> dict[str, Answer]:
        return trimoe.plan(str(family_folder(family)), {"steps": list(steps)}).loads_in

    known, by_transformers = answers(DROP), answers(DROP, family="hunyuan_v1_moe")["vllm"]
    assert known["vllm"].words == "yes, as mixtral (0.32.0, tried)" and known["vllm"].tried
    assert known["sglang"].words == "yes, as mixtral (0.5.23, not tried)" and not known["sglang"].tried
    assert by_transformers.words == "yes, by transformers' own code (0.32.0, tried)"
    assert answers({"expert_drop": {"ratio": 0.25}})["vllm"] == Answer("no", "expert counts differ from layer to layer")
    assert answers({"low_rank": {"ratio": 0.1, "rank": "uniform"}})["sglang"] == Answer("no", "experts are factored")
    assert answers({"weight_prune": {"ratio": 0.5, "form": "bitmask"}})["llama.cpp"] == Answer("no", "zeros are left out of the files")
    dropped = answers({"layer_drop": {"count": 1}})["vllm"]
    assert dropped.loads == "no" and dropped.why.startswith("MoE sub-layers are dropped")
    packed = answers({"quantize": {"group": 8}})
    lacking = "made for it, but without a kernel: its kernels take groups of 32, 64 and 128 inputs, not 8"
    assert packed["vllm"].loads == "files" and packed["vllm"].words == lacking and packed["llama.cpp"].loads == "yes"
    for engine in ("vllm", "sglang", "llama.cpp"):  # vLLM removed it in 0.23; the others never had it
        assert answers(DROP, family="minimax")[engine].words.startswith("not known: minimax is not in its list")
    assert answers(DROP, family="jamba")["sglang"].loads == "unknown"
    emptied = answers({"layer_drop": {"count": 1}}, family="qwen2_moe")
    assert emptied["vllm"].words == "yes, as qwen2_moe (0.32.0, tried)" and "router in every layer" in emptied["llama.cpp"].why
    for said in (known, packed, emptied):
        assert {engine: Answer.from_json(one.words) for engine, one in said.items()} == said


def test_a_tied_head_is_not_promised_to_loaders_that_want_one(tmp_path: Path) -> None:
    for tied in (True, False):
        families.save("qwen2_moe", tmp_path / str(tied), tie_word_embeddings=tied)
        said = trimoe.plan(str(tmp_path / str(tied)), {"steps": [DROP]}).loads_in["llama.cpp"]
        assert said.loads == ("no" if tied else "yes") and ("wants a head" in said.why) == tied
    with pytest.raises(UserError, match=r"target is llama.cpp, and llama.cpp does not load the result: its loader of qwen2_moe"):
        trimoe.plan(str(tmp_path / "True"), {"steps": [DROP], "target": "llama.cpp"})


def test_packed_results_suit_every_target(family_folder: Family) -> None:
    """llama.cpp's converter unpacks them."""
    for target in ("vllm", "llama.cpp", "any"):
        trimoe.plan(str(family_folder("mixtral")), {"steps": [{"quantize": {"group": 8}}], "target": target})


@pytest.mark.parametrize(
    ("hidden", "width", "group", "word"),
    [
        (2048, 768, 128, None),
        (2880, 2880, 64, "hidden sizes"),
        (2048, 96, 32, None),
        (256, 256, 256, None),
        (256, 512, 256, "groups"),
        (2048, 768, 96, "groups"),
    ],
)
def test_what_kernels_take(hidden: int, width: int, group: int, word: str | None) -> None:
    found = engines.kernels_lack(hidden, width, group)
    assert found is None if word is None else found is not None and word in found


# ---- warnings


def test_warnings_each(family_folder: Family) -> None:
    folder = family_folder("mixtral")
    quiet = {"expert_drop": {"count": 1, "counts": "uniform"}}
    assert words(folder, steps=[quiet]) == []
    idle = words(folder, steps=[{"expert_drop": {"ratio": 0.001, "counts": "uniform"}}])
    assert idle[0].startswith("expert_drop drops nothing: 0.001 of ") and idle[0].endswith(" routed experts is rounded to none.")
    half = words(folder, steps=[{"expert_drop": {"ratio": 0.5, "counts": "uniform"}}])
    assert [part.split(":")[0] for part in half] == ["expert_drop of 50% is beyond the usual 0.25", "perplexity flatters here"]
    assert words(folder, steps=[{"expert_drop": {"ratio": 0.5, "counts": "uniform"}}], recover={"method": "logits"})[0].startswith(
        "perplexity flatters"
    )
    low = words(
        folder,
        steps=[{"expert_drop": {"count": 4, "counts": "uniform"}}, {"low_rank": {"ratio": 0.5, "rank": "uniform", "form": "factored"}}],
    )
    assert [part for part in low if part.startswith(("low_rank", "only"))] == [
        "low_rank of 50% is beyond the usual 0.4: on mini-mixtral KL rose from 0.011 at 40 % to 0.065 at 60 %; plan recovery (trimoe recover).",
        "only 24% of the expert parameters stay; beyond half, recovery training is usually needed.",
    ]
    assert words(folder, steps=[{"weight_prune": {"pattern": "1:4", "score": "magnitude"}}])[0].startswith("weight_prune of 75% is beyond")
    assert [part[:24] for part in words(folder, steps=[{"block_drop": {"count": 1}}])] == ["perplexity flatters here"]
    saving = words(folder, steps=[{"low_rank": {"ratio": 0.2, "rank": "uniform"}}])
    assert any("an engine that loads the dense form alone loses what low_rank saves" in part and "quantize" in part for part in saving)
    assert any("block_drop in the place of layer_drop" in part for part in words(folder, steps=[{"layer_drop": {"count": 1}}]))
    native = words(folder, steps=[{"expert_drop": {"ratio": 0.125}}])
    assert native == ["the result loads in transformers only; vLLM, SGLang and llama.cpp would need --set steps.0.counts=uniform."]
    assert any("halve the speed of prefill" in part for part in words(folder, steps=[{"quantize": {"group": 8}}]))


def test_warnings_about_calibration(family_folder: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "mine.txt"):
        Path(name).write_text("letters " * 40_000)
    folder, mild = str(family_folder("mixtral")), {"expert_drop": {"count": 1, "counts": "uniform"}}

    def of(step: dict[str, Any], **calibration: Any) -> list[str]:
        return trimoe.plan(folder, {"steps": [step], "calibration": {"samples": 4096, "length": 64, **calibration}}).warnings

    assert of(mild, data="builtin:english") == [
        "calibration has no docs and no code: experts that only such text uses look idle and go first; builtin:mixed has all three."
    ]
    assert of(mild, data=["builtin:english", "builtin:docs", "builtin:code"]) == of(mild, data=["a.txt", "b.txt"]) == []
    assert of(mild, data="mine.txt")[0].startswith("calibration is one text (mine.txt)")
    # 20 samples of 64 tokens, 2 of 8 experts a token: 320 an expert; 2,048 tokens are 512
    assert of(mild, samples=20) == [
        "1,280 calibration tokens are 320 an expert on average; kept sets may be unstable below 512: take 2,048."
    ]
    assert of(mild, samples=32) == []
    assert of({"quantize": {"method": "round", "group": 8}}, samples=2, data="mine.txt")[1:] == []  # reads no text
    assert trimoe.plan(folder, {"steps": [mild]}, calibration=["mine.txt"], samples=4096).warnings[0].startswith("calibration is one text")


# ---- disk


def test_disk_by_part(family_folder: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(family_folder("mixtral"))
    plain = trimoe.plan(folder, {"steps": [{"quantize": {"method": "round", "group": 8}}]})
    beside = plain.disk_split["files beside the weights"]
    assert plain.disk_split["result"] == plain.after.file_bytes == plain.disk - beside and len(plain.disk_split) == 2 and plain.spill == 0
    searched = trimoe.plan(folder, {"steps": [DROP], "recover": {"method": "logits", "samples": 16, "length": 32}})
    assert set(searched.disk_split) == {
        "result",
        "files beside the weights",
        "statistics, until it is done",
        "result before recovery, until it is done",
        "training, until it is done",
    }
    assert searched.disk == sum(searched.disk_split.values()) > 2 * searched.after.file_bytes
    monkeypatch.setattr(disk, "BUDGET", 1 << 16)
    bare, fitted, found = (
        trimoe.plan(folder, {"steps": [step]}, samples=64, length=64).spill
        for step in ({"expert_drop": {"count": 2, "counts": "uniform", "score": "gate", "search": None}}, {"quantize": {"group": 8}}, DROP)
    )
    assert bare == 64 * 64 * 32 * 4 - (1 << 16) and fitted == 2 * bare
    skeleton, reach = Skeleton.of(folder), ExpertDrop(count=2, counts="uniform", search=Greedy()).reach(Skeleton.of(folder).sites)
    experts, layers, tokens = 8, len(skeleton.sites), 4096  # the first layer's logits, alone, are more than the budget
    assert found == bare + layers * tokens * (4 * experts + 8 * reach + 4 * reach**2 + 4)
    assert disk.search_spilled(skeleton, load({"steps": [DROP]}), tokens) == found - bare


def test_plan_says_on_how_much_text(family_folder: Family) -> None:
    """As many as compress measures on; and where search_memory holds fewer search tokens than are wanted."""
    optimal = {"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy"}}
    made = trimoe.plan(str(family_folder("mixtral")), {"steps": [optimal], "calibration": {"search_memory": 1e-4}}, samples=30, length=64)
    rows = {row["name"]: row for row in made.measured_on}
    assert rows["Statistics"]["tokens"] == 1920 and rows["Sensitivity"] == {
        "step": 0, "name": "Sensitivity", "tokens": 24 * 64, "samples": 24, "versions": len(made.layers) + 1
    }  # fmt: skip
    taken = int(1e-4 * 2**30 / (4 * 8**2))
    assert rows["Search"] == {"step": 0, "name": "Search", "tokens": taken, "wanted": 1920, "routed": taken * 2 // 8}
    assert f"{taken // 4} an expert, on average; 1,920 do not fit" in " ".join(str(made).split())
    assert "decided on" not in str(trimoe.plan(str(family_folder("mixtral")), {"steps": [{"quantize": {"method": "round", "group": 8}}]}))


def test_search_tokens_lie_where_the_plan_says(family_folder: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are made of as many bytes as were counted, at a budget that holds some of them."""
    made: list[int] = []
    monkeypatch.setattr(hidden_states.os, "posix_fallocate", lambda file, start, size: (made.append(size), os.ftruncate(file, size)))
    for module in (disk, hidden_states):
        monkeypatch.setattr(module, "BUDGET", 200_000)
    skeleton, recipe = Skeleton.of(str(family_folder("qwen2_moe"))), load({"steps": [DROP]})
    reach, held = recipe.steps[0].reach(skeleton.sites), 0
    for site in skeleton.sites.values():
        _, held = gather._search_room(site, reach, 1000, held)
    assert 0 < sum(made) < held and sum(made) == disk.search_spilled(skeleton, recipe, 1000)


def test_statistics_on_disk_are_what_plan_says(
    family_folder: Family, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that a killed run would find: as large as planned, within its header."""
    from trimoe.journal import Journal

    sizes: list[int] = []
    real = Journal.put_stats

    def put(self: Journal, stage: str, stats: Any) -> None:
        real(self, stage, stats)
        sizes.append((self.folder / f"{stage}.safetensors").stat().st_size)

    monkeypatch.setattr(Journal, "put_stats", put)
    recipe = {"steps": [DROP], "calibration": {"data": str(text_file), "samples": 6, "length": 32, "search_tokens": 192}}
    made = trimoe.compress(str(family_folder("mixtral")), recipe, tmp_path / "out")
    files = [path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"]
    assert sum(files) < made.plan.disk_split["files beside the weights"] < sum(files) + (1 << 19)
    planned = made.plan.disk_split["statistics, until it is done"]
    assert 0.5 * sizes[0] < planned < 1.2 * sizes[0]  # order and logits of search tokens are not counted, headers neither


def test_a_statistics_file_is_planned_with_every_expert_in_reach(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any recipe may start from it; with the usual limit of a layer, two of these sixteen experts would be out of reach."""
    families.save("mixtral", tmp_path / "wide", num_local_experts=16)
    asked: list[int] = []
    monkeypatch.setattr(free_disk, "check", lambda out, wanted, spill=0, *, left=None: asked.append(wanted))
    made = trimoe.gather_statistics(tmp_path / "wide", tmp_path / "file", calibration=str(text_file), samples=6, length=32)
    assert all(layer.search["order_TM"].shape == (192, 16) for layer in made.layers.values())
    size = (tmp_path / "file").stat().st_size
    assert asked[0] < size < asked[0] + 20_000


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"The result needs 1\.00 TiB of disk at .*, which has .* free"):
        free_disk.check(tmp_path / "new", 1 << 40)
    monkeypatch.setattr(free_disk.tempfile, "gettempdir", lambda: "/proc")
    with pytest.raises(UserError, match=r"Hidden states that do not fit in memory need .* set TMPDIR"):
        free_disk.check(tmp_path / "new", 1, 1 << 40)
    assert hidden_states.BUDGET > 0


def test_layers_that_nobody_chose_yet_are_shown_as_they_are_if_kept(family_folder: Family) -> None:
    for step in ({"layer_drop": {"count": 1}}, {"block_drop": {"count": 1}}):
        made = trimoe.plan(family_folder("mixtral"), {"steps": [step]})
        assert {row["kept"] for row in made.layers} == {None} and {row["gone"] for row in made.layers} == {None}
        assert len({row["after"]["bytes"] for row in made.layers}) == 1 and made.layers[0]["after"]["bytes"] > 0
        assert made.after.parameters < made.before.parameters
        assert "which ones go is decided on the calibration" in " ".join(str(made).split())


@pytest.mark.parametrize(("more", "message"), [
    (["-c", "nofile.txt"], "There is no text file 'nofile.txt'"), (["-c", "builtin:nope"], "There is no built-in text"),
    (["--device", "gpu"], "The device 'gpu' is not known"),
    (["-c", "EMPTY"], "is empty; give one that holds at least one sample"), (["-c", "name=EMPTY"], "is empty"),
    (["--set", "calibration.data=nofile.txt"], "There is no text file 'nofile.txt'"),
    (["--set", "calibration.data=builtin:nope"], "There is no built-in text"),
])  # fmt: skip
def test_plan_finds_what_can_be_found_without_weights(
    more: list[str], message: str, family_folder: Family, line: Line, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    more = [word.replace("EMPTY", str(tmp_path / "empty.txt")) for word in more]
    line.refused(message, "plan", family_folder("mixtral"), "-r", "expert-drop", *more)


# ---- with statistics


def test_statistics_of_another_model_and_of_another_text(family_folder: Family, text_file: Path, line: Line, tmp_path: Path) -> None:
    folder, stats = family_folder("mixtral"), tmp_path / "stats"
    trimoe.gather_statistics(str(folder), stats, calibration=[str(text_file)], samples=4, length=32)
    plan = ["plan", folder, "-r", "expert-drop", "--stats", stats, "-c", text_file, "--length", 32]
    code, shown, _ = line.run(*plan, "--samples", 4)
    shown = " ".join(shown.split())
    assert code == 0 and "would refuse" not in shown and "after, equal counts" in shown and "compress decides" in shown
    warnings = json.loads(line.run(*plan, "--samples", 6, "--json")[1])["warnings"]
    assert any("holds 128 tokens of other calibration text than the 192 that the recipe asks for" in words for words in warnings)
    warnings = json.loads(line.run(*plan, "--samples", 4, "--dtype", "bfloat16", "--json")[1])["warnings"]
    assert any("was gathered in float32, and compress runs in bfloat16: it would refuse the file" in words for words in warnings)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    shard = next(other.glob("*.safetensors"))
    tensors = load_file(shard)
    name = min(tensors, key=lambda key: tensors[key].numel())
    save_file({**tensors, name: tensors[name] + 1}, shard, metadata={"format": "pt"})
    line.refused("is of another model of the same shapes", "plan", other, *plan[2:])


def test_statistics_that_compress_would_refuse_for_other_reasons(
    family_folder: Family, text_file: Path, line: Line, tmp_path: Path
) -> None:
    folder, stats = family_folder("mixtral"), tmp_path / "stats"
    trimoe.gather_statistics(str(folder), stats, calibration=[str(text_file)], samples=4, length=32, seed=5)
    given = ["--stats", stats, "-c", text_file, "--samples", 4, "--length", 32]
    warnings = json.loads(line.run("plan", folder, "-r", "low-rank", "--json", *given)[1])["warnings"]
    assert any("starts from singular values" in words and "would refuse" in words for words in warnings)
    assert any("was gathered with --seed 5" in words for words in warnings)
    line.refused("is a folder; a statistics file is expected", "plan", folder, "-r", "naee", "--stats", tmp_path)


def test_tokens_are_no_more_than_the_text_can_hold(family_folder: Family, line: Line, tmp_path: Path) -> None:
    folder, text = family_folder("mixtral"), tmp_path / "text.txt"
    text.write_text("letters " * 500)  # at most 8,016 tokens
    recipe = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform"}}]}
    full, more = (trimoe.plan(str(folder), recipe, calibration=[str(text)], samples=samples, length=32) for samples in (251, 10**9))
    assert full.memory_split == more.memory_split and full.spill == more.spill == 0
    assert trimoe.plan(str(folder), recipe, calibration=[str(text), "org/data"], samples=10**9, length=32).spill > 1 << 30  # not known
    text.write_text("a b")
    line.refused("has fewer tokens than one sample of 64", "plan", folder, "-r", "naee", "--length", 64, "-c", text)
    line.refused("A text has no name", "plan", folder, "-r", "naee", "-c", "")
    (tmp_path / "folder.yaml").mkdir()
    line.refused("is a folder; a YAML file is expected", "plan", folder, "-r", tmp_path / "folder.yaml")
    line.refused("recipe: steps.0.expert_drop: give ratio or count".removeprefix("recipe: "), "plan", folder, "-r", _yaml(tmp_path))


def _yaml(folder: Path) -> Path:
    path = folder / "none.yaml"
    path.write_text("steps: [{expert_drop: {}}]")
    return path


def test_memory_on_a_gpu_is_of_its_batches(family_folder: Family) -> None:
    recipe = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform"}}], "calibration": {"samples": 4096, "length": 64}}
    host, device, other = (
        trimoe.plan(str(family_folder("mixtral")), recipe, device=name, dtype="float32") for name in ("cpu", "cuda", "cpu:0")
    )
    assert host.memory_split == other.memory_split and host.device_split == other.device_split == {}
    assert device.device_split["statistics"] > host.memory_split["statistics"] - IMPORTS
    assert device.memory_split["statistics"] < host.memory_split["statistics"] and device.peak_memory == max(device.memory_split.values())
    assert "memory of the device" in str(device) and "memory of the device" not in str(host)


def test_dense_factors_have_one_size_and_save_nothing(family_folder: Family) -> None:
    body = {"steps": [{"low_rank": {"ratio": 0.3, "rank": "optimal", "form": "dense"}}]}
    made = trimoe.plan(str(family_folder("mixtral")), body)
    assert made.after.exact and made.after.parameters == made.before.parameters
    assert any("the file gets no smaller" in words for words in made.warnings)


def test_a_layer_that_stays_keeps_its_experts(family_folder: Family) -> None:
    shown = str(trimoe.plan(str(family_folder("mixtral")), {"steps": [{"block_drop": {"count": 1}}]}))
    assert "8 -> 8" in shown and "8 -> ?" not in shown and "if it stays" in shown
    both = {"steps": [{"expert_drop": {"ratio": 0.3, "counts": "optimal", "search": "greedy"}}, {"layer_drop": {"count": 1}}]}
    assert "8 -> ?" in str(trimoe.plan(str(family_folder("mixtral")), both))
