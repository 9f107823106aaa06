"""weight_prune, end to end: the weights that the papers' formulas name are zero on disk, all others bit for bit the source's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from zeros import (
    ALL,
    FEW,
    SPREAD,
    Folder,
    compress,
    dense,
    disk,
    expert_keys,
    file_bytes,
    inputs_of,
    lawful,
    named,
    rows,
    scores,
    stacks,
    step,
    tokens,
    whole_layers,
    whole_stacks,
)

import trimoe
from trimoe.model.skeleton import Skeleton


@pytest.mark.parametrize(("family", "fields"), [
    (family, fields) for families_, fields in (
        (SPREAD, {"ratio": 0.5}), (SPREAD, {"pattern": "2:4", "score": "wanda", "form": "bitmask"}), (FEW, {"pattern": "2:4"}),
        (FEW, {"ratio": 0.5, "score": "wanda"}), (FEW, {"ratio": 0.3, "score": "magnitude", "form": "bitmask"}),
        (FEW, {"pattern": "1:8", "score": "magnitude"}),
    ) for family in families_
], ids=named)  # fmt: skip
def test_masks_are_the_papers(family: str, fields: dict[str, Any], family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """Layer by layer in the stock model, the layers before replaced by what was written: later ones are pruned for what pruned ones give."""
    source, out, score = family_folder(family), tmp_path / "out", fields.get("score", "moe_pruner")
    compress(source, text_file, out, step(**fields))
    skeleton, model, ids = Skeleton.of(str(source)), families.build(family), tokens(source, text_file)
    layers: Any = model.get_submodule(skeleton.prefix)
    checked = 0
    for index, small in whole_layers(Skeleton.of(str(out))):
        if index not in skeleton.sites:
            continue
        site = skeleton.sites[index]
        old, new = site.experts_of(layers[index]), site.experts_of(small)
        wanted = scores(old, *inputs_of(model, old, ids), score)
        for place, (before, after) in enumerate(zip(stacks(old), stacks(new), strict=True)):
            for expert in range(len(before)):
                width = before.shape[2]
                m, zeros = (width, int(fields.get("ratio", 0) * width + 1e-9))
                if "pattern" in fields:
                    keep, m = map(int, fields["pattern"].split(":"))
                    zeros = m - keep
                lawful(wanted[expert][place], after[expert], before[expert], m, zeros)
            before.copy_(after)
        checked += 1
    assert checked >= 2


def test_without_differing_gates_moe_pruner_is_wanda(text_file: Path, family_folder: Folder, tmp_path: Path) -> None:
    """One expert a token, its weight normalised to 1; with two the scores differ."""
    families.save("mixtral", tmp_path / "one", num_experts_per_tok=1)
    for source, same in ((tmp_path / "one", True), (family_folder("mixtral"), False)):
        found = []
        for score in ("moe_pruner", "wanda"):
            compress(source, text_file, tmp_path / f"{score}{same}", step(ratio=0.5, score=score))
            found.append(disk(tmp_path / f"{score}{same}"))
        assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items()) == same


@pytest.mark.parametrize(("score", "compare"), [("moe_pruner", "row"), ("wanda", "row"), ("sparsegpt", "row"), ("wanda", "layer")])
def test_experts_without_tokens(score: str, compare: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """By |w|, and the metrics count them."""
    source, out = family_folder("qwen3_moe"), tmp_path / "out"
    result = compress(source, text_file, out, step(ratio=0.5, score=score, compare=compare), samples=1, length=2)
    skeleton, model = Skeleton.of(str(source)), families.build("qwen3_moe")
    site, index = skeleton.sites[0], 0
    experts = site.experts_of(model.get_submodule(skeleton.prefix)[index])
    given = inputs_of(model, experts, tokens(source, text_file, samples=1, length=2))
    unseen = sorted(set(range(8)) - set(given[1].flatten().tolist()))
    about = result.metrics["weight_prune"]["layers"]
    assert 4 <= len(unseen) == about["0"]["unseen_experts"]
    assert all(entry["zeros"] == 0.5 and entry["unseen_experts"] >= 4 for entry in about.values())
    if compare == "row" and score != "sparsegpt":
        new = whole_stacks(out)[0]
        for before, after in zip(stacks(experts), new, strict=True):
            for expert in unseen:
                lawful(before[expert].abs().double(), after[expert], before[expert], before.shape[2], before.shape[2] // 2)


def test_sparsegpt_makes_up_for_what_goes(family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """Every family: exact shares of zeros; over all families the first MoE layer's output on calibration text moves less than with wanda's
    weights (taken from the reference)."""
    moved: dict[str, list[float]] = {"wanda": [], "sparsegpt": []}
    for family in ALL:
        source, out = family_folder(family), tmp_path / family
        skeleton, model, ids = Skeleton.of(str(source)), families.build(family), tokens(source, text_file, 12)
        result = compress(source, text_file, out, step(ratio=0.5, score="sparsegpt"), samples=12)
        assert file_bytes(out) == result.plan.bytes == trimoe.plan(str(source), {"steps": [step(ratio=0.5, score="sparsegpt")]}).bytes
        found = whole_stacks(out)
        for stack in (stack for both in found.values() for stack in both):
            assert [int((weight == 0).sum()) for weight in stack] == [stack[0].numel() // 2] * len(stack), family
        index, site = next(iter(skeleton.sites.items()))
        experts = site.experts_of(model.get_submodule(skeleton.prefix)[index])  # type: ignore[index]
        given, old = inputs_of(model, experts, ids), [stack.clone() for stack in stacks(experts)]
        other = scores(experts, *given, "wanda")
        wanda = [
            torch.stack([w * (s >= s.median(1, keepdim=True).values.nextafter(torch.tensor(torch.inf).double())) for w, s in zip(stack, both, strict=True)])
            for stack, both in zip(old, zip(*other, strict=True), strict=True)
        ]  # fmt: skip
        assert all(float((stack == 0).float().mean()) == 0.5 for stack in wanda)
        with torch.no_grad():
            wanted = experts(*given)
            for name, new in (("wanda", wanda), ("sparsegpt", found[index])):
                for parameter, stack in zip(stacks(experts), new, strict=True):
                    parameter.copy_(stack)
                moved[name].append(float((experts(*given) - wanted).square().sum() / wanted.square().sum()))
    better = [small < large for small, large in zip(moved["sparsegpt"], moved["wanda"], strict=True)]
    assert sum(moved["sparsegpt"]) < 0.9 * sum(moved["wanda"]) and sum(better) > 0.8 * len(better), moved


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_sparsegpt_keeps_patterns(pattern: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    source, out = family_folder("gpt_oss"), tmp_path / "out"
    compress(source, text_file, out, step(pattern=pattern, score="sparsegpt", form="bitmask"))
    m, new = int(pattern[-1]), dense(out)
    for key in expert_keys(source):
        assert bool(((rows(new[key], "gpt_oss").reshape(-1, m) != 0).sum(1) == m // 2).all())


# ---- compare: layer


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("score", ["moe_pruner", "magnitude"])
def test_compare_layer(family: str, score: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """The exact share of a layer's first projections and of its last ones, the lowest scores among them all."""
    source, out = family_folder(family), tmp_path / "out"
    result = compress(source, text_file, out, step(ratio=0.3, score=score, compare="layer"))
    assert result.plan.bytes == file_bytes(out)
    skeleton, model, ids = Skeleton.of(str(source)), families.build(family), tokens(source, text_file)
    layers: Any = model.get_submodule(skeleton.prefix)
    counts, shares = [], []
    for index, small in whole_layers(Skeleton.of(str(out))):
        if index not in skeleton.sites:
            continue
        site = skeleton.sites[index]
        old, new = site.experts_of(layers[index]), site.experts_of(small)
        given = inputs_of(model, old, ids)
        wanted = scores(old, *given, score)
        for place, (before, after) in enumerate(zip(stacks(old), stacks(new), strict=True)):
            lawful(torch.stack([both[place] for both in wanted]), after, before, before.numel(), before.numel() * 3 // 10)
            before.copy_(after)
        seen = (given[1].unsqueeze(-1) == torch.arange(8)).sum((0, 1)).float()
        counts.append(seen / seen.std())
        shares.append(torch.stack([(stack == 0).float().mean((1, 2)) for stack in stacks(new)]).mean(0))
    correlation = float(torch.corrcoef(torch.stack([torch.cat(counts), torch.cat(shares)]))[0, 1])
    assert correlation < -0.6 if score == "moe_pruner" else abs(correlation) < 0.6


def test_rare_expert_loses_more(text_file: Path, tmp_path: Path) -> None:
    """A correction bias that keeps tokens from one expert: compared by layer it loses most, by row as much as all."""
    model = families.build("deepseek_v3", n_group=1)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
        layer.mlp.gate.e_score_correction_bias[3] = -0.35
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    families.tokenizer().save_pretrained(tmp_path / "source")
    shares = {}
    for compare in ("row", "layer"):
        compress(tmp_path / "source", text_file, tmp_path / compare, step(ratio=0.5, compare=compare), samples=8)
        shares[compare] = torch.stack([(stack == 0).float().mean((1, 2)) for stack in whole_stacks(tmp_path / compare)[1]]).mean(0)
    assert shares["row"].tolist() == [0.5] * 8
    assert int(shares["layer"].argmax()) == 3 and shares["layer"][3] > 0.6
    assert float(shares["layer"].mean()) == pytest.approx(0.5, abs=1e-6)
