"""Intervals, generation and what is remembered; lm-eval's tasks are in test_tasks.py."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import trimoe
from trimoe import cli
from trimoe.checkpoint.folder import Checkpoint
from trimoe.evaluate import cache, generation, intervals
from trimoe.evaluate.cache import ResultCache
from trimoe.evaluate.texts import windows
from trimoe.model.skeleton import Skeleton
from trimoe.show import results
from trimoe.show.frontier import of_mean_kl
from trimoe.text import samples
from trimoe.text.samples import encode, read_text

DROP = {"steps": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "frequency"}}]}


# ---- intervals


def sums_of(windows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (windows,), generator=generator).double()
    draw = {name: torch.rand(windows, generator=generator, dtype=torch.float64) * 4 for name in ("nll", "against_nll", "kl", "agreement")}
    return {"tokens": tokens, **{name: value * tokens for name, value in draw.items()}}


@pytest.mark.parametrize(("documents", "what"), [(12, "documents"), (3, "windows")])
@pytest.mark.parametrize("held", [1 << 24, 50], ids=["at once", "in parts"])
def test_intervals_equal_a_slow_loop(documents: int, what: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "HELD", held)
    sums, document_N = sums_of(30), torch.arange(30) % documents + 7  # documents are numbered with gaps where a text is cut
    said = intervals.of_text(sums, document_N)
    assert said["resampled"] == what
    owner = document_N.tolist() if what == "documents" else list(range(30))
    units = sorted(set(owner))
    generator = np.random.default_rng(intervals.SEED)
    drawn: dict[str, list[float]] = {}
    for _ in range(intervals.RESAMPLES):
        times = generator.multinomial(len(units), [1 / len(units)] * len(units))
        total = dict.fromkeys(sums, 0.0)
        for window in range(30):
            for name, value in sums.items():
                total[name] += int(times[units.index(owner[window])]) * float(value[window])
        drawn.setdefault("perplexity", []).append(math.exp(total["nll"] / total["tokens"]))
        drawn.setdefault("against_perplexity", []).append(math.exp(total["against_nll"] / total["tokens"]))
        drawn.setdefault("kl", []).append(total["kl"] / total["tokens"])
        drawn.setdefault("agreement", []).append(total["agreement"] / total["tokens"])
        drawn.setdefault("difference_log_perplexity", []).append((total["nll"] - total["against_nll"]) / total["tokens"])
    assert said["intervals"].keys() == drawn.keys()
    for name, values in drawn.items():
        ordered = sorted(values)
        for end, percent in zip(said["intervals"][name], (2.5, 97.5), strict=True):
            place = percent / 100 * (len(ordered) - 1)
            low = int(place)
            assert end == pytest.approx(ordered[low] + (place - low) * (ordered[low + 1] - ordered[low]), rel=1e-12), name


def test_intervals_are_paired_and_as_wide_as_they_should_be() -> None:
    sums = sums_of(400)
    sums["against_nll"] = sums["nll"] - 0.1 * sums["tokens"]  # the same difference everywhere: nothing is unsure about it
    said = intervals.of_text(sums, torch.arange(400))["intervals"]
    assert said["difference_log_perplexity"] == pytest.approx([0.1, 0.1], abs=1e-12)
    each = sums["agreement"] / sums["tokens"]
    sums["tokens"], sums["agreement"] = torch.ones(400, dtype=torch.float64), each
    low, high = intervals.of_text(sums, torch.arange(400))["intervals"]["agreement"]
    assert high - low == pytest.approx(2 * 1.96 * float(each.std()) / 20, rel=0.1)


def test_one_window_has_no_interval() -> None:
    said = intervals.of_text(sums_of(1), torch.tensor([0]))
    assert said == {"resampled": "windows", "intervals": None}


def test_a_kl_is_never_below_zero(family_folder: Callable[[str], Path], text_file: Path) -> None:
    folder = family_folder("mixtral")
    (row,) = trimoe.evaluate(folder, against=folder, text=[str(text_file)], length=16, tokens=200, generate=False)["texts"]
    assert 0.0 <= row["kl"] < 1e-6 and row["intervals"]["kl"][0] >= 0.0


def test_the_interval_of_a_mean_over_texts() -> None:
    texts = [{"kl": 0.2, "intervals": {"kl": [0.17, 0.26]}}, {"kl": 0.1, "intervals": {"kl": [0.06, 0.18]}}]
    low, high = of_mean_kl(texts)
    assert low == pytest.approx(0.15 - 0.05 / 2) and high == pytest.approx(0.15 + 0.1 / 2)
    assert of_mean_kl([{"kl": 0.01, "intervals": {"kl": [-0.2, 0.02]}}])[0] == 0.0
    for without in (None, {"perplexity": [1.0, 2.0]}):
        assert of_mean_kl([*texts, {"kl": 0.1, "intervals": without}]) == (None, None)
    generator = np.random.default_rng(0)
    drawn = generator.normal(0.5, 0.03, 100_000) / 2 + generator.normal(0.7, 0.04, 100_000) / 2
    said = of_mean_kl(
        [{"kl": mean, "intervals": {"kl": [mean - 1.96 * error, mean + 1.96 * error]}} for mean, error in ((0.5, 0.03), (0.7, 0.04))]
    )
    assert said == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=1e-3)


def test_report_and_table_have_intervals(family_folder: Callable[[str], Path], text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = family_folder("mixtral")
    report = trimoe.evaluate(folder, against=folder, text=[str(text_file)], length=32, tokens=500)
    (row,) = report["texts"]
    assert row["resampled"] == "windows"
    for name, value in (("perplexity", row["perplexity"]), ("kl", row["kl"]), ("agreement", row["agreement"])):
        low, high = row["intervals"][name]
        assert low <= value <= high
    assert row["intervals"]["difference_log_perplexity"] == [0.0, 0.0]
    results.evaluation(report)
    shown = capsys.readouterr().out
    assert "paired bootstrap over windows" in " ".join(shown.split())
    assert f"{row['intervals']['perplexity'][0]:.3f}-" in shown


# ---- generation


@pytest.mark.parametrize(("tokens", "looping"), [
    ([7] * 12, True), ([7] * 11, False), (list(range(40)), False), ([1, 2, 3, 4] * 3, True), (list(range(20)) + [5, 6] * 6, True),
    (list(range(20)) + [5, 6] * 6 + [9], False), ([1, 2, 3, 4, 5] * 3, True), ([1, 2, 3, 4, 5] * 2, False), ([], False),
    ([8, 9] * 6 + [8], True),  # a cycle that the end of the text cuts
])  # fmt: skip
def test_what_a_loop_is(tokens: list[int], looping: bool) -> None:
    assert generation.loops(tokens) is looping


def test_distinct() -> None:
    assert generation.distinct([1, 2]) is None
    assert generation.distinct([1, 2, 3, 1, 2, 3]) == 3 / 4
    assert generation.distinct(list(range(9))) == 1.0


def test_generation_is_the_models_own_and_the_same_every_time(
    family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    folder = family_folder("qwen2_moe")
    trimoe.compress(folder, DROP, tmp_path / "out", calibration=[str(text_file)], samples=4, length=32)
    options = dict(against=folder, text=[str(text_file)], length=32, tokens=500, generate=True)
    first, second = (trimoe.evaluate(tmp_path / "out", **options)["generation"] for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first["prompts"] == generation.PROMPTS and first["new_tokens"] == 32
    for name in ("model", "against"):
        assert {"loops", "empty", "distinct", "samples", "greedy", "sampled"} <= first[name].keys()
        assert first[name]["loops"] == pytest.approx((first[name]["greedy"]["loops"] + first[name]["sampled"]["loops"]) / 2)
    skeleton = Skeleton.of(str(folder))
    model, tokenizer = trimoe.load(folder), samples.load_tokenizer(skeleton.checkpoint)
    (text,) = read_text(str(text_file))
    ids = generation.prompts([windows("letters", encode(tokenizer, text, 96), 32, 16, 500)], 64)[:1]
    sample, written = first["against"]["samples"][0], []
    assert sample["prompt"] == tokenizer.decode(ids[0])
    for _ in range(32):
        token = int(model(ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert sample["greedy"] == tokenizer.decode(written)


def test_a_model_that_says_one_thing_loops_and_one_that_stops_is_empty(text_file: Path, tmp_path: Path) -> None:
    for name, token, expected in (("stuck", 40, ("loops", "empty")), ("silent", 2, ("empty", "loops"))):
        model = families.build("mixtral")
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.lm_head.weight.zero_()
            model.model.norm.weight[0] = 1.0
            model.model.embed_tokens.weight[:, 0] = 1e4  # the residual stream always points the same way
            model.lm_head.weight[token, 0] = 100.0
        model.save_pretrained(tmp_path / name)
        families.tokenizer().save_pretrained(tmp_path / name)
        found = trimoe.evaluate(tmp_path / name, text=[str(text_file)], length=32, tokens=200, generate=True)["generation"]["model"]
        assert found[expected[0]] == 1.0 and found[expected[1]] == 0.0, name


def test_prompts_are_text_and_not_padding(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": "abcdefgh" * size}) + "\n" for size in (1, 2, 4, 5)))
    tokenizer = families.tokenizer()
    (text,) = read_text(str(path))
    ids = generation.prompts([windows("short", encode(tokenizer, text, 96), 64, 32, 10**6)], 64)
    assert ids.shape == (2, 32) and bool((ids > 0).all())


# ---- what is remembered


def test_results_are_taken_from_the_cache_and_only_where_nothing_changed(
    family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMOE_CACHE", str(tmp_path / "cache"))
    command = ["eval", str(family_folder("mixtral")), "--text", str(text_file), "--length", "32", "--no-generate", "--json"]

    def run(number: int, *more: str) -> tuple[str, str]:
        result = CliRunner().invoke(cli.app, [*command, str(tmp_path / f"{number}.json"), *more])
        assert result.exit_code == 0, result.output
        return result.output, (tmp_path / f"{number}.json").read_text()

    first, second, other = run(1, "--tokens", "100"), run(2, "--tokens", "100"), run(3, "--tokens", "200")
    assert "from the cache" not in first[0] and "from the cache" in second[0] and "from the cache" not in other[0]
    assert first[1] == second[1] != other[1]
    assert "from the cache" not in run(4, "--tokens", "100", "--no-cache")[0]
    for path in (tmp_path / "cache").iterdir():
        path.write_text(path.read_text()[:-20])
    mended = run(5, "--tokens", "100")
    assert "from the cache" not in mended[0] and mended[1] == first[1]
    assert "from the cache" in run(6, "--tokens", "100")[0]


def test_many_may_write_at_once_and_nothing_half_written_is_read(tmp_path: Path) -> None:
    depends = {"kind": "texts", "what": 1}
    values = [{"values": [number] * 2000} for number in range(8)]

    def work(number: int) -> None:
        for _ in range(20):
            ResultCache(tmp_path).put(depends, values[number])
            assert ResultCache(tmp_path).get(depends) in values

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(list(tmp_path.iterdir())) == 1
    assert ResultCache(tmp_path).get({"kind": "texts", "what": 2}) is None
    assert ResultCache(None).get(depends) is None


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ResultCache(tmp_path / "file")
    cache.put({"kind": "texts"}, 1)
    assert cache.get({"kind": "texts"}) is None


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.json, "dump", full)
    ResultCache(tmp_path / "kept").put({"kind": "texts"}, 1)
    assert list((tmp_path / "kept").iterdir()) == []


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRIMOE_CACHE")
    monkeypatch.setattr(Path, "home", none)
    assert cache.default_folder() is None


def test_results_of_other_libraries_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ResultCache(tmp_path).put({"kind": "texts"}, 1)
    assert ResultCache(tmp_path).get({"kind": "texts"}) == 1
    monkeypatch.setattr(cache, "versions", lambda: {"torch": "another"})
    assert ResultCache(tmp_path).get({"kind": "texts"}) is None


def test_a_shard_written_again_is_another_model_wherever_it_differs(tmp_path: Path) -> None:
    """Between the pieces that fingerprints take, too."""
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    path = tmp_path / "model.safetensors"
    save_file({"large": torch.zeros(1 << 20)}, path)
    before = Checkpoint.open(tmp_path)
    said = before.fingerprint, cache.identity(before)
    with open(path, "r+b") as file:
        file.seek(100_000)
        file.write(b"\x01")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    after = Checkpoint.open(tmp_path)
    assert after.fingerprint == said[0], "the byte must lie between the pieces"
    assert cache.identity(after) != said[1]


# ---- the field's texts


def test_wikitext_without_a_network_names_the_file_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in ("wikitext2", "ptb"):
        with pytest.raises(trimoe.UserError, match=f"(?s){name}.*Couldn't reach.*{name}=FILE.txt"):
            read_text(name, "eval")


def test_wikitext_and_ptb_are_one_document_of_the_right_part(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(kind: str, *, data_files: dict[str, str], split: str) -> dict[str, list[str]]:
        asked.append((data_files[split], split))
        return {"text": ["a", "b"], "sentence": ["c", "d"]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_text("wikitext2", "eval")[0].documents == ("a\n\nb",)
    assert read_text("ptb")[0].documents == ("c d",)
    assert "test" in asked[0][0] and asked[0][1] == "test" and asked[1][1] == "train" and "train" in asked[1][0]


def test_a_file_may_take_the_name(tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_text("".join(random.Random(0).choices("abc ", k=100)))
    assert read_text(f"wikitext2={path}", "eval")[0].domain == "wikitext2"
