"""Dropped MoE sub-layers and decoder layers: chosen as defined, written exactly, the same function as the original without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimoe
from trimoe.errors import UserError
from trimoe.methods.depth import candidates
from trimoe.model.depth_config import droppable_blocks, renumbered
from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import stock_class
from trimoe.walk.versions import divergence, skipped, without_moe

ALL = sorted(families.FAMILIES)
IDS = torch.arange(3, 35).view(2, 16)
NO_LAYER_DROP = {"minimax"}  # the residual stream is normed on the way
# Which of the three tiny layers can go where not all can: jamba and minimax give layers their kind by their number; of gpt_oss and
# qwen3_next the middle one is the only full attention, and the last of its kind stays (transformers' cache wants one).
BLOCKS = {"gpt_oss": [0, 2], "jamba": [2], "minimax": [], "qwen3_next": [0, 2]}
STOCK_LAYER_DROP = {"qwen2_moe", "qwen3_moe", "qwen3_next"}


def dropped_by(result: trimoe.Result) -> dict[int, str]:
    return {index: decision.gone for index, decision in result.decisions.items() if decision.gone}


@torch.no_grad()
def expected(family: str, folder: Path, gone: dict[int, str]) -> torch.Tensor:
    """Logits of the original with those parts bypassed by hooks: no trimoe writing or loading involved."""
    model, skeleton = families.build(family), Skeleton.of(str(folder))
    layers: Any = model.get_submodule(skeleton.prefix)
    for index, kind in gone.items():
        if kind == "moe":
            skeleton.sites[index].block_of(layers[index]).register_forward_hook(
                lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
            )
        else:
            layers[index].register_forward_hook(
                lambda m, a, k, out: (
                    hidden := a[0] if a else k["hidden_states"],
                    (hidden, *out[1:]) if isinstance(out, tuple) else hidden,
                )[1],
                with_kwargs=True,
            )
    return model(IDS, use_cache=False).logits


def compress(family_folder: Callable[[str], Path], family: str, text_file: Path, out: Path, *steps: dict[str, Any]) -> trimoe.Result:
    return trimoe.compress(family_folder(family), {"steps": list(steps)}, out, calibration=[str(text_file)], samples=6, length=32)


@pytest.mark.parametrize("family", [family for family in ALL if family not in NO_LAYER_DROP])
def test_layer_drop_is_the_model_without_the_block(
    family: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = compress(family_folder, family, text_file, out, {"layer_drop": {"count": 1}})
    assert list(dropped_by(result).values()) == ["moe"]
    assert result.plan.form == ("stock" if family in STOCK_LAYER_DROP else "native")
    assert result.plan.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    before = trimoe.plan(str(family_folder(family)), {"steps": [{"layer_drop": {"count": 1}}]})
    assert before.after.least_bytes <= result.plan.after.file_bytes <= before.after.file_bytes
    model = trimoe.load(out)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(family, family_folder(family), dropped_by(result)), atol=1e-4, rtol=1e-4)
    if result.plan.form == "native":
        with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
            stock_class(families.config_of(family)).from_pretrained(out)
    again = trimoe.plan(str(out), {"steps": [{"expert_drop": {"count": 2, "counts": "uniform"}}]})
    assert [row["layer"] for row in again.layers] == [i for i in result.decisions if result.decisions[i].gone is None]


@pytest.mark.parametrize("family", ALL)
def test_which_layers_can_go(family: str, family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder(family)))
    if BLOCKS.get(family) == []:
        with pytest.raises(UserError, match="kind by their number"):
            droppable_blocks(skeleton)
    else:
        assert droppable_blocks(skeleton) == BLOCKS.get(family, [0, 1, 2])


@pytest.mark.parametrize(("family", "which"), [(family, which) for family in ALL for which in BLOCKS.get(family, [0, 1, 2])])
def test_block_drop_is_the_model_without_the_layer(
    family: str, which: int, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(candidates, "similarity", lambda part, stats, metric: 1.0 if part[1] == which else 0.0)
    result = compress(family_folder, family, text_file, out, {"block_drop": {"count": 1}})
    assert dropped_by(result) == {which: "block"}
    assert result.plan.form == "stock"
    assert result.plan.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    model = trimoe.load(out)
    assert model.config.get_text_config().num_hidden_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(family, family_folder(family), {which: "block"}), atol=1e-4, rtol=1e-4)
        tokens, again = (model.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_with_dropped_and_factored_experts(family: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """Experts, layers and ranks in one recipe: the decisions stand together in one folder."""
    out = tmp_path / "out"
    steps = [
        {"expert_drop": {"ratio": 0.25}},
        {"layer_drop": {"count": 1, "rerank": "kl"}},
        {"low_rank": {"ratio": 0.3, "rank": "optimal"}},
    ]
    result = compress(family_folder, family, text_file, out, *steps)
    assert list(dropped_by(result).values()) == ["moe"]
    assert result.plan.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    first = trimoe.load(out)(IDS).logits
    assert torch.isfinite(first).all()
    streamed = trimoe.evaluate(out, text=[str(text_file)], length=32, tokens=100)
    assert streamed["texts"][0]["perplexity"] > 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jamba"])
def test_dropping_through_steps_adds_up(family: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """A folder that lost a layer loses another: native forms are carried over."""
    folder = family_folder(family)
    count = len(Skeleton.of(str(folder)).sites)
    first = compress(family_folder, family, text_file, tmp_path / "a", {"layer_drop": {"count": 1}})
    gone = dropped_by(first)
    if count < 3:
        with pytest.raises(UserError, match="can go"):
            trimoe.plan(str(tmp_path / "a"), {"steps": [{"layer_drop": {"count": 1}}]})
        return
    second = trimoe.compress(
        tmp_path / "a", {"steps": [{"layer_drop": {"count": 1}}]}, tmp_path / "b", calibration=[str(text_file)], samples=4, length=32
    )
    both = gone | dropped_by(second)
    assert len(both) == 2
    with torch.no_grad():
        torch.testing.assert_close(trimoe.load(tmp_path / "b")(IDS).logits, expected(family, folder, both), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "step", "message"), [
    ("minimax", {"layer_drop": {"count": 1}}, "unchanged residual stream"),
    ("minimax", {"block_drop": {"count": 1}}, "kind by their number"),
    ("mixtral", {"layer_drop": {}}, "give one of ratio, count and threshold"),
    ("mixtral", {"layer_drop": {"count": 3}}, "1 to 2 can go"),
    ("jamba", {"block_drop": {"count": 2}}, "means 2 of 3 decoder layers; 1 to 1 can go"),
    ("gpt_oss", {"block_drop": {"count": 2}}, "1 to 1 can go"),
    ("mixtral", {"block_drop": {"ratio": 0.01}}, "means 0 of 3"),
    ("mixtral", {"layer_drop": {"threshold": 0.5, "choose": "consecutive"}}, "how long a consecutive run is"),
    ("mixtral", {"block_drop": {"count": 1, "choose": "consecutive", "rerank": "kl"}}, "it wants choose: discrete"),
    ("mixtral", {"layer_drop": {"count": 1, "blocks": True, "choose": "consecutive"}}, "cannot be mixed"),
])  # fmt: skip
def test_what_cannot_be_is_said_at_plan_time(family: str, step: dict[str, Any], message: str, family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=message):
        trimoe.plan(str(family_folder(family)), {"steps": [step]})


COHERE = dict(num_experts=8, num_experts_per_tok=2, intermediate_size=24, head_dim=8)


def test_a_norm_that_feeds_attention_too_is_no_part_of_the_sub_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "cohere2_moe", COHERE)
    families.save("cohere2_moe", tmp_path / "model")
    with pytest.raises(UserError, match="no norm that feeds the MoE block alone"):
        trimoe.plan(str(tmp_path / "model"), {"steps": [{"layer_drop": {"count": 1}}]})


def test_one_moe_block_stays_whatever_is_asked(family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    steps = [{"layer_drop": {"count": 1}}, {"block_drop": {"count": 2}}]
    result = compress(family_folder, "deepseek_v3", text_file, tmp_path / "out", *steps)
    left = [i for i in Skeleton.of(str(family_folder("deepseek_v3"))).sites if result.decisions[i].gone is None]
    assert len(left) == 1
    assert trimoe.evaluate(tmp_path / "out", text=[str(text_file)], length=32, tokens=100)["texts"]
    with pytest.raises(UserError, match="none of the 1 MoE layers can go"):
        trimoe.plan(str(tmp_path / "out"), {"steps": [{"layer_drop": {"count": 1}}]})
    compress(family_folder, "mixtral", text_file, tmp_path / "factored", {"low_rank": {"ratio": 0.3}})
    with pytest.raises(UserError, match="drop layers before low_rank"):
        trimoe.plan(str(tmp_path / "factored"), {"steps": [{"layer_drop": {"count": 1}}]})


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [(a, b, ("uniform", "importance", "optimal")[(a + b) % 3]) for a in range(3) for b in range(3)],  # every pair of the three once
)
def test_the_interval_holds_whatever_is_dropped(
    first: int,
    second: int,
    counts: str,
    family_folder: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "similarity", lambda part, stats, metric: float(part[1] == (first if part[0] == "moe" else second)))
    steps = [{"expert_drop": {"ratio": 0.375, "counts": counts}}, {"layer_drop": {"count": 1}}, {"block_drop": {"count": 1}}]
    before = trimoe.plan(str(family_folder("mixtral")), {"steps": steps})
    result = compress(family_folder, "mixtral", text_file, tmp_path / "out", *steps)
    assert before.after.least_bytes <= result.plan.after.file_bytes <= before.after.file_bytes


def test_other_engines_are_not_promised_what_goes_by_number(family_folder: Callable[[str], Path]) -> None:
    drop = {"steps": [{"block_drop": {"count": 1}}]}
    assert trimoe.plan(str(family_folder("mixtral")), drop).loads_in["vllm"].loads == "yes"
    assert trimoe.plan(str(family_folder("gpt_oss")), drop).loads_in["vllm"].loads == "unknown"
    with pytest.raises(UserError, match="take a layer's kind from its number"):
        trimoe.plan(str(family_folder("gpt_oss")), {**drop, "target": "vllm"})


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_divergence_of_versions(family: str, family_folder: Callable[[str], Path]) -> None:
    """KL of several versions at once equals each version measured by itself in memory."""
    skeleton = Skeleton.of(str(family_folder(family)))
    last = max(skeleton.sites)
    versions: dict[Any, Any] = {
        "none": {}, "moe": {last: without_moe}, "block": {1: skipped}, "both": {1: skipped, last: without_moe} if last != 1 else {1: skipped},
    }  # fmt: skip
    batches = [IDS[:1], IDS[1:]]
    got = divergence(skeleton, batches, versions, "none")
    truth = expected(family, family_folder(family), {}).double().log_softmax(-1)
    for name, changes in versions.items():
        if name == "none":
            continue
        gone = {index: "block" if change is skipped else "moe" for index, change in changes.items()}
        other = expected(family, family_folder(family), gone).double().log_softmax(-1)
        assert got[name] == pytest.approx(float((truth.exp() * (truth - other)).sum(-1).mean()), rel=2e-3, abs=1e-7)


def depth_of(count: int, kinds: str = "", blocks: bool = True) -> candidates.Depth:
    layers = tuple(range(count))
    return candidates.Depth(layers, layers, (), layers if blocks else (), dict(enumerate(kinds or "a" * count)))


@settings(max_examples=80, deadline=None)
@given(values=st.lists(st.floats(-1, 1), min_size=2, max_size=6, unique=True), data=st.data())
def test_picks(values: list[float], data: st.DataObject) -> None:
    """Against every set there is: the most similar of those that leave a MoE block and a layer of every kind."""
    kinds = data.draw(st.text("ab", min_size=len(values), max_size=len(values)))
    kind: Any = data.draw(st.sampled_from(["moe", "block"]))
    depth = depth_of(len(values), kinds)
    similar: dict[candidates.Part, float] = {(kind, index): value for index, value in enumerate(values)}
    most = depth.most(list(similar), mixed=False)
    sets = [list(chosen) for size in range(1, len(values) + 1) for chosen in combinations(similar, size) if depth.allows(chosen)]
    assert most == max((len(chosen) for chosen in sets), default=0)
    if most == 0:
        return
    total = data.draw(st.integers(1, most))
    best = candidates.pick(similar, depth, total)
    assert len(best) == total
    assert depth.allows(best)
    assert sum(similar[part] for part in best) == pytest.approx(
        max(sum(similar[part] for part in chosen) for chosen in sets if len(chosen) == total)
    )
    runs = [chosen for chosen in sets if len(chosen) == total and chosen[-1][1] - chosen[0][1] == total - 1]
    if runs:
        found = candidates.pick(similar, depth, total, consecutive=True)
        assert sum(similar[part] for part in found) == pytest.approx(max(sum(similar[part] for part in run) for run in runs))
    else:
        with pytest.raises(UserError, match="no run of"):
            candidates.pick(similar, depth, total, consecutive=True)
    threshold = data.draw(st.floats(-1, 1))
    above = candidates.pick(similar, depth, None, threshold=threshold)
    assert all(similar[part] > threshold for part in above)
    assert depth.allows(above)


def test_mixtures_count_sub_layers() -> None:
    depth = depth_of(4)
    similar: dict[candidates.Part, float] = {
        ("moe", 0): 0.9, ("moe", 1): 0.7, ("moe", 2): 0.6, ("moe", 3): 0.5,
        ("block", 0): 0.85, ("block", 1): 0.2, ("block", 2): 0.1, ("block", 3): 0.88,
    }  # fmt: skip
    assert candidates.pick(similar, depth, 1, mixed=True) == [("moe", 0)], "a block does not fit"
    assert candidates.pick(similar, depth, 2, mixed=True) == [("block", 3)], "per sub-layer 0.06 is less than 0.075 and 0.1"
    assert candidates.pick(similar, depth, 4, mixed=True) == [("block", 3), ("block", 0)]
    assert candidates.pick(similar, depth, 5, mixed=True) == [("block", 3), ("block", 0), ("moe", 1)]
    assert depth.add([("moe", 1)], ("block", 1), 2, mixed=True) == [("block", 1)], "a block takes its dropped sub-layer in"
    emptied = candidates.Depth((0, 1, 2), (1, 2), (0,), (0, 1, 2), dict.fromkeys(range(3), "a"))
    assert emptied.cost(("block", 0), (), mixed=True) == 1, "its MoE block went in an earlier step"
    assert depth.most(list(similar), mixed=True) == 6, "the last MoE block stays, and its attention cannot go alone"


def test_renumbering_of_config_fields() -> None:
    config = {"num_hidden_layers": 5, "layer_types": list("abcde"), "mlp_only_layers": [0, 3], "first_k_dense_replace": 2, "other": [1, 2]}
    assert renumbered(config, [0, 2, 4], 5) == {
        "num_hidden_layers": 3, "layer_types": ["a", "c", "e"], "mlp_only_layers": [0], "first_k_dense_replace": 1, "other": [1, 2],
    }  # fmt: skip
    assert renumbered(config, range(5), 5) == config


def test_similarity_chooses_what_changes_least(family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """A sub-layer whose experts give almost nothing must be the one that goes, and its metrics say so."""
    import shutil

    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(family_folder("mixtral"), source)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: t * 1e-3 if "layers.1." in k and ".w2." in k else t for k, t in tensors.items()}, path, metadata={"format": "pt"})
    for metric in ("residual", "output"):
        result = trimoe.compress(source, {"steps": [{"layer_drop": {"count": 1, "metric": metric}}]}, tmp_path / metric,
                                 calibration=[str(text_file)], samples=4, length=32)  # fmt: skip
        if metric == "output":  # of a sub-layer that gives nothing, the direction still counts: the paper's point
            assert len(dropped_by(result)) == 1
            continue
        assert dropped_by(result) == {1: "moe"}
        said = json.loads((tmp_path / metric / "trimoe.json").read_text())["metrics"]["0.layer_drop"]
        assert max(said["similarity"], key=said["similarity"].get) == "moe 1"
        assert said["similarity"]["moe 1"] > 0.9999
