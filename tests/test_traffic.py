"""Expert-parallel traffic, against loops over tokens and ranks, and against the routing of a model in memory."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimoe
from trimoe.evaluate.texts import windows
from trimoe.model.skeleton import Skeleton
from trimoe.output import card
from trimoe.output.record import Record
from trimoe.show import results
from trimoe.text.samples import load_tokenizer
from trimoe.walk.expert_parallel import WAYS, Traffic, rank_of_expert

HIDDEN = 32
DROP = {"steps": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "frequency"}}]}


def counted(index_TK: torch.Tensor, num_experts: int, counted_T: torch.Tensor | None = None) -> Traffic:
    traffic = Traffic()
    traffic.add(0, num_experts, HIDDEN, index_TK, torch.ones(len(index_TK), dtype=torch.bool) if counted_T is None else counted_T)
    return traffic


def by_hand(index: list[list[int]], num_experts: int, ways: int) -> dict[str, float]:
    """Every token on every rank in turn, every message counted."""
    blocks: list[list[int]] = []
    for rank in range(ways):
        start = sum(map(len, blocks))
        blocks.append(list(range(start, start + num_experts // ways + (1 if rank < num_experts % ways else 0))))
    holder = {expert: rank for rank, block in enumerate(blocks) for expert in block}
    message, sent, naive = HIDDEN * 2, 0, 0
    for experts in index:
        for home in range(ways):
            for rank in range(ways):
                if rank != home and any(expert in blocks[rank] for expert in experts):
                    sent += message  # dispatch
                    sent += message  # combine
            naive += 2 * message * sum(holder[expert] != home for expert in experts)
    load = Counter(holder[expert] for experts in index for expert in experts)
    return {
        "distinct_ranks": sum(len({holder[expert] for expert in experts}) for experts in index) / len(index),
        "bytes_per_token": sent / ways / len(index), "naive_bytes_per_token": naive / ways / len(index),
        "imbalance": max(load.values()) / (sum(load.values()) / ways),
    }  # fmt: skip


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """(E, distinct experts of each token [T, k])."""
    num_experts = draw(st.integers(2, 19))
    top_k, tokens = draw(st.integers(1, min(6, num_experts))), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    lean_E = torch.randn(num_experts, generator=generator) * draw(st.sampled_from([0.0, 1.0, 5.0]))
    return num_experts, (torch.randn(tokens, num_experts, generator=generator) + lean_E).topk(top_k)[1]


@settings(max_examples=80, deadline=None)
@given(routing=routings(), data=st.data())
def test_it_counts_what_a_loop_counts(routing: tuple[int, torch.Tensor], data: st.DataObject) -> None:
    num_experts, index_TK = routing
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(index_TK), max_size=len(index_TK))))
    mask[0] = True
    traffic = counted(index_TK, num_experts, mask)
    for ways in WAYS:
        made = traffic.report(ways)
        if ways > num_experts:
            assert made is None
            continue
        assert made is not None
        expected = by_hand(index_TK[mask].tolist(), num_experts, ways)
        (row,) = made["layers"]
        assert row == {"layer": 0} | {name: pytest.approx(value) for name, value in expected.items()}
        assert made["bytes_per_token"] == row["bytes_per_token"] <= made["naive_bytes_per_token"] * (1 + 1e-12)
        assert made["imbalance"] == {"mean": row["imbalance"], "worst": row["imbalance"]}
        assert 1 <= row["imbalance"] <= ways


@settings(max_examples=60, deadline=None)
@given(routing=routings(), cut=st.integers(0, 30))
def test_merged_parts_equal_the_whole(routing: tuple[int, torch.Tensor], cut: int) -> None:
    num_experts, index_TK = routing
    whole = counted(index_TK, num_experts)
    batched, left, right = Traffic(), Traffic(), Traffic()
    for part, own in ((index_TK[:cut], left), (index_TK[cut:], right)):
        for traffic in (batched, own):
            traffic.add(0, num_experts, HIDDEN, part, torch.ones(len(part), dtype=torch.bool))
    right.add(1, num_experts, HIDDEN, index_TK, torch.ones(len(index_TK), dtype=torch.bool))
    left.merge(right)
    for ways in WAYS:
        expected, merged, joint = whole.report(ways), left.report(ways), batched.report(ways)
        assert joint == expected
        assert (merged is None) == (expected is None)
        if merged is not None and expected is not None:
            assert merged["layers"] == [{**expected["layers"][0], "layer": layer} for layer in (0, 1)]
            assert merged["bytes_per_token"] == 2 * expected["bytes_per_token"]


@given(num_experts=st.integers(2, 300), ways=st.sampled_from(WAYS))
def test_experts_lie_in_contiguous_blocks_as_equal_as_possible(num_experts: int, ways: int) -> None:
    rank_E = rank_of_expert(num_experts, ways).tolist()
    sizes = [rank_E.count(rank) for rank in range(ways)]
    assert len(rank_E) == num_experts == sum(sizes)
    assert rank_E == sorted(rank_E)
    assert all(a - b >= 0 for a, b in pairwise(sizes)) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("ways", WAYS)
def test_all_of_a_tokens_experts_on_one_rank(ways: int) -> None:
    size = 16 // ways
    made = counted(torch.tensor([[size * rank, size * rank + 1] for rank in range(ways)]), 16).report(ways)
    assert made is not None
    assert made["bytes_per_token"] == pytest.approx(2 * (ways - 1) / ways * HIDDEN * 2)
    assert made["naive_bytes_per_token"] == pytest.approx(2 * made["bytes_per_token"])
    assert made["imbalance"]["worst"] == 1
    lonely = counted(torch.zeros(7, 1, dtype=torch.int64), 16).report(ways)
    assert lonely is not None and lonely["imbalance"]["worst"] == ways


@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 8), (8, 2), (60, 4)])
def test_uniform_routing_tends_to_the_expectation(num_experts: int, top_k: int) -> None:
    index_TK = torch.rand(40_000, num_experts, generator=torch.Generator().manual_seed(1)).topk(top_k)[1]
    traffic = counted(index_TK, num_experts)
    for ways in WAYS:
        blocks = torch.bincount(rank_of_expert(num_experts, ways)).tolist()
        missed = [math.comb(num_experts - size, top_k) / math.comb(num_experts, top_k) for size in blocks]
        expected = 2 * sum(1 - share for share in missed) * (ways - 1) / ways * HIDDEN * 2
        made = traffic.report(ways)
        assert made is not None
        assert made["bytes_per_token"] == pytest.approx(expected, rel=0.01)
        assert made["imbalance"]["worst"] == pytest.approx(max(blocks) * ways / num_experts, rel=0.02)


def test_counting_never_waits_for_the_device() -> None:
    """Tensors without data have nothing to wait for: whatever would need a value on the host raises here."""
    index_TK = torch.zeros(5, 2, dtype=torch.int64, device="meta")
    traffic = counted(index_TK, 8, torch.ones(5, dtype=torch.bool, device="meta"))
    assert traffic.layers[0].tokens.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        traffic.report(2)


def test_layers_add_up_and_the_smallest_limits_the_ranks() -> None:
    traffic, every = Traffic(), torch.ones(3, dtype=torch.bool)
    traffic.add(4, 8, HIDDEN, torch.tensor([[0, 7], [0, 7], [1, 6]]), every)
    traffic.add(1, 5, HIDDEN, torch.tensor([[0, 1], [0, 2], [1, 2]]), every)  # ranks of 3 and 2 experts
    made = traffic.report(2)
    assert made is not None
    assert [(row["layer"], row["distinct_ranks"]) for row in made["layers"]] == [(1, 1.0), (4, 2.0)]
    assert made["bytes_per_token"] == pytest.approx((1 + 2) * 2 * HIDDEN * 2 / 2)
    assert made["imbalance"] == {"mean": 1.5, "worst": 2.0}
    assert traffic.report(4) is not None
    assert traffic.report(8) is None, "five experts do not reach eight ranks"


def test_a_model_without_moe_layers_sends_nothing() -> None:
    traffic = Traffic()
    with traffic.watching(torch.nn.Linear(2, 2), None, []):
        pass
    assert traffic.report(8) == {
        "bytes_per_token": 0, "naive_bytes_per_token": 0, "imbalance": {"mean": 1.0, "worst": 1.0}, "layers": [],
    }  # fmt: skip


@torch.no_grad()
def in_memory(model: Any, skeleton: Skeleton, ids_NL: torch.Tensor, scored_NL: torch.Tensor, ways: int) -> list[dict[str, float]]:
    """What the model's own routers say in one forward pass, counted by loops."""
    seen: dict[int, torch.Tensor] = {}
    for index, site in skeleton.sites.items():
        router = site.router_of(model.get_submodule(skeleton.prefix)[index])
        router.register_forward_hook(lambda m, a, out, index=index: seen.__setitem__(index, out[2].reshape(-1, out[2].shape[-1])))
    model(ids_NL)
    return [
        {"layer": index, **by_hand(seen[index][scored_NL.flatten()].tolist(), skeleton.sites[index].num_experts, ways)} for index in seen
    ]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_evaluate_reports_the_models_own_routing(
    family: str,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["trimoe.evaluate.texts"], "BATCH_TOKENS", 3 * 32)  # several batches, the last one smaller
    source, out, text = family_folder(family), tmp_path / "out", tmp_path / "short.jsonl"
    lines = ["the quick brown fox jumps over the lazy dog " * 3, "pad me.", "and so, to bed"]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    trimoe.compress(source, DROP, out, calibration=[str(text)], samples=4, length=16)
    report = trimoe.evaluate(out, against=str(source), text=[str(text)], length=32, stride=16, tokens=500)
    traffic = json.loads(json.dumps(report))["traffic"]
    assert traffic["hidden_bytes"] == HIDDEN * 2
    assert list(traffic["ways"]) == ["2", "4", "8"]
    tokenizer = load_tokenizer(Skeleton.of(str(source)).checkpoint)
    entry = windows("short", [torch.tensor(tokenizer.encode(line)) for line in lines], 32, 16, 500)
    assert (entry.ids_NL == 0).any() and len(entry.ids_NL) % 3, "the text must make padding and a smaller last batch"
    assert report["texts"][0]["tokens"] == int(entry.scored_NL.sum())
    for name, folder in (("model", out), ("against", source)):
        skeleton = Skeleton.of(str(folder))
        for ways in WAYS:
            said = traffic["ways"][str(ways)][name]
            if name == "model" and ways == 8:
                assert said is None, "6 experts are left"
                continue
            rows = in_memory(trimoe.load(folder), skeleton, entry.ids_NL, entry.scored_NL, ways)
            assert said["layers"] == [{key: pytest.approx(value, rel=1e-9) for key, value in row.items()} for row in rows]
            assert said["bytes_per_token"] == pytest.approx(sum(row["bytes_per_token"] for row in rows))
            assert said["imbalance"]["worst"] == pytest.approx(max(row["imbalance"] for row in rows))
    results.evaluation(report)
    shown = capsys.readouterr().out
    assert "Expert parallelism" in shown and "saving" in shown
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    card.keep(Record.read(copy).with_evaluation(report))
    readme = (copy / "README.md").read_text()
    assert f"| 2 | {traffic['ways']['2']['against']['bytes_per_token']:,.0f} |" in readme
    assert readme.index("all-to-all") < readme.index("## Quality")


def test_one_model_alone(family_folder: Callable[[str], Path], text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = trimoe.evaluate(family_folder("mixtral"), text=[str(text_file)], length=32, tokens=64)
    assert all(list(entry) == ["model"] for entry in report["traffic"]["ways"].values())
    results.evaluation(report)
    shown = capsys.readouterr().out
    assert "imbalance" in shown and "before" not in shown
