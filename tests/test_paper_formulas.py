"""What the papers' recipes decide, against the papers' formulas in float64, written out slowly; and that every setting called a paper's is its."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file

import trimoe
from trimoe.methods import BlockDrop, ExpertDrop, LayerDrop, LowRank, Method, Quantize, WeightPrune
from trimoe.model.skeleton import Skeleton
from trimoe.recipe import recipe
from trimoe.text.samples import calibrate
from trimoe.walk.decided import masked

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "papers"
SAMPLES = {"samples": 8, "length": 32}
ROUTERS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3"]  # another way of weighing experts each
LOUD = 3.0  # the second MoE layer's outputs times so much: raw norms and relative losses then rank layers differently


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model with experts wide enough for ranks to differ, and layers of different loudness. Tests must not write into it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("papers") / family
            width = "moe_intermediate_size" if "moe_intermediate_size" in families.FAMILIES[family] else "intermediate_size"
            model = families.build(family, hidden_size=64, **{width: 96})
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "layers.2." in name and name.endswith("experts.down_proj"):
                        parameter.mul_(LOUD)
            model.save_pretrained(made[family])
            families.tokenizer().save_pretrained(made[family])
        return made[family]

    return get


def tokens(folder: Path, text: Path) -> torch.Tensor:
    skeleton = Skeleton.of(str(folder))
    return calibrate(skeleton.checkpoint, [str(text)], **SAMPLES, context=64, vocabulary=96, seed=0).samples_NL


@torch.no_grad()
def importance(folder: Path, ids_NL: torch.Tensor) -> dict[int, list[float]]:
    """I_ie = ||F_i(X) - F_i(X; E minus e)||_F over all tokens, in float64: each MoE block run again without one expert."""
    skeleton = Skeleton.of(str(folder))
    model = trimoe.load(folder, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")
    given: dict[int, Any] = {}
    layers = model.get_submodule(skeleton.prefix)
    for index, site in skeleton.sites.items():
        layers[index].get_submodule(site.block).register_forward_pre_hook(lambda _, args, index=index: given.__setitem__(index, args))
    model(ids_NL)
    found = {}
    for index, site in skeleton.sites.items():
        block, args = layers[index].get_submodule(site.block), given[index]
        whole, losses = first(block(*args)), []
        for expert in range(site.num_experts):
            with masked(layers[index], site, (expert,)):
                losses.append(float((whole - first(block(*args))).norm()))
        found[index] = losses
    return found


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def shared_out(importance_L: list[float], total: int, most: int, step: int) -> list[int]:
    """`total` experts in proportion to 1 / importance, at most `most` of a layer, by largest remainder, of equals the later layer."""
    share, fixed = [0.0] * len(importance_L), set[int]()
    while True:
        free = [i for i in range(len(share)) if i not in fixed]
        left = total - most * len(fixed)
        weight = sum(1 / importance_L[i] for i in free)
        for i in free:
            share[i] = left / importance_L[i] / weight
        over = [i for i in free if share[i] > most]
        if not over:
            break
        fixed |= set(over)
        for i in over:
            share[i] = float(most)
    counts = [math.floor(value / step + 1e-9) * step for value in share]
    for i in sorted(range(len(share)), key=lambda i: (-(share[i] - counts[i]), -i)):
        if sum(counts) < total and counts[i] + step <= most:
            counts[i] += step
    return counts


@pytest.mark.parametrize(("family", "bare"), [("mixtral", True), *((family, False) for family in ROUTERS)])
def test_counts_follow_the_raw_importance_of_layers(
    family: str, bare: bool, models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    folder = models(family)
    step = {"expert_drop": {"ratio": 0.25}} if bare else {"expert_drop": {"ratio": 0.25, "search": "greedy", **paper_drop()}}
    result = trimoe.compress(folder, {"steps": [step]}, tmp_path / "out", calibration=[str(text_file)], **SAMPLES)
    sites = Skeleton.of(str(folder)).sites
    per_layer = {index: sum(values) / len(values) for index, values in importance(folder, tokens(folder, text_file)).items()}
    site, total = next(iter(sites.values())), round(0.25 * sum(site.num_experts for site in sites.values()) / 2) * 2
    wanted = shared_out([per_layer[index] for index in sites], total, site.num_experts - site.rule.min_experts, site.rule.groups)
    dropped = {index: site.num_experts - len(result.decisions[index].keep) for index, site in sites.items()}
    assert dropped == dict(zip(sites, wanted, strict=True))
    for index, row in result.metrics["0.expert_drop"]["layers"].items():
        assert sum(row["score"]) / site.num_experts == pytest.approx(per_layer[int(index)], rel=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_ranks_and_factors_are_the_papers(family: str, models: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    folder, out = models(family), tmp_path / "out"
    (step,) = [step for step in paper("moe-i2-paper").steps if isinstance(step, LowRank)]
    body = {"low_rank": {"ratio": step.ratio, "rank": step.rank, "factors": step.factors, "whiten": step.whiten}}
    result = trimoe.compress(folder, {"steps": [body]}, out, calibration=[str(text_file)], **SAMPLES)
    sites = Skeleton.of(str(folder)).sites
    for index, losses in importance(folder, tokens(folder, text_file)).items():
        site, decision = sites[index], result.decisions[index]
        # three matrices of H x I at rank R hold 3 R (H + I) weights
        average = (1 - step.ratio) * site.hidden * site.width / (site.hidden + site.width)
        weight = [(loss + 1e-8) ** 0.15 for loss in losses]
        exact = [w / sum(weight) * average * site.num_experts for w in weight]
        units = math.floor(average * site.num_experts / 8 + 1e-9)
        ranks = [math.floor(value / 8) for value in exact]
        for expert in sorted(range(len(exact)), key=lambda e: (-(exact[e] / 8 - ranks[e]), e))[: units - sum(ranks)]:
            ranks[expert] += 1
        assert max(ranks) * 8 <= site.hidden * site.width / (site.hidden + site.width), "the cap binds; give the test other widths"
        assert decision.in_ranks == decision.out_ranks == tuple(8 * rank for rank in ranks)
        assert decision.separate
    assert len({rank for decision in result.decisions.values() for rank in decision.in_ranks or ()}) > 1
    assert result.plan.after.file_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))

    before, after = trimoe.load(folder, dtype=torch.float32), trimoe.load(out, dtype=torch.float32)
    for index, site in sites.items():
        old, new = (site.experts_of(model.get_submodule(Skeleton.of(str(folder)).prefix)[index]) for model in (before, after))
        x = torch.randn(5, site.hidden, generator=torch.Generator().manual_seed(index))
        for expert, rank in enumerate(result.decisions[index].in_ranks or ()):
            gate, up, down = three(old, expert)
            h = activated(old, expert, x @ truncated(gate, rank).T, x @ truncated(up, rank).T)
            wanted = h @ truncated(down, rank).T + (old.down_proj_bias[expert] if old.has_bias else 0)
            torch.testing.assert_close(new._one(x, expert), wanted, rtol=1e-4, atol=1e-4)
        stored = [tensor for name, tensor in new.named_parameters() if name.endswith(("_u", "_v"))]
        assert sum(tensor.numel() for tensor in stored) == sum(
            3 * rank * (site.hidden + site.width) for rank in result.decisions[index].in_ranks or ()
        )


def three(experts: Any, expert: int) -> list[torch.Tensor]:
    """Gate, up and down as outputs by inputs, written out for the two layouts of transformers."""
    both, down = experts.gate_up_proj[expert].detach(), experts.down_proj[expert].detach()
    if experts.is_transposed:
        both, down = both.T, down.T
    half = len(both) // 2
    return [both[:half], both[half:], down] if experts.is_concatenated else [both[::2], both[1::2], down]


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]).float()


@torch.no_grad()
def activated(experts: Any, expert: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not experts.has_bias:
        return torch.nn.functional.silu(gate) * up
    bias = experts.gate_up_proj_bias[expert]
    gate, up = (gate + bias[::2]).clamp(max=experts.limit), (up + bias[1::2]).clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)


def test_separate_factors_resume_and_train_as_factors(models: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """Optimal ranks too: matrices that stay dense beside separate ones, read again from disk, and taught layer by layer."""
    folder, out = models("mixtral"), tmp_path / "out"
    steps = [{"low_rank": {"ratio": 0.3, "rank": "optimal", "factors": "separate"}}]
    result = trimoe.compress(folder, {"steps": steps}, out, calibration=[str(text_file)], **SAMPLES)
    ranks = {rank for decision in result.decisions.values() for rank in (*decision.in_ranks, *decision.out_ranks)}
    assert -1 in ranks and len(ranks) > 2
    spec = {"method": "experts", "data": str(text_file), "samples": 8, "length": 32, "batch": 4, "holdout": 0.25, "steps": 2}
    trained = trimoe.recover(out, tmp_path / "trained", spec)
    assert trained.metrics["after"]["expert_error"] <= trained.metrics["before"]["expert_error"]
    keys = {key.rpartition(".")[2] for path in (tmp_path / "trained").glob("*.safetensors") for key in load_file(path)}
    assert {"in_u", "in_v", "in_w", "out_u", "out_v"} <= keys


# ---- the settings


def paper(name: str) -> recipe.Recipe:
    return recipe.load(name)


def paper_drop() -> dict[str, Any]:
    """Fields that every expert_drop of a paper has."""
    return {"normalize": "none", "layer_limit": None, "protect_super_experts": False, "cross_check": False}


def check(steps: Sequence[Method], name: str) -> None:
    for step in steps:
        check_step(step, name)


def check_step(step: Method, name: str) -> None:
    if isinstance(step, ExpertDrop):
        assert {field: getattr(step, field) for field in paper_drop()} == paper_drop(), name
        assert step.counts != "optimal", name
        if step.receptive_field is not None:
            assert (step.receptive_field.k, step.receptive_field.t) == (3, 3), name
        if type(step.search).__name__ == "Genetic":
            assert (step.search.population, step.search.generations) == (100, 50), name  # type: ignore[union-attr]
    elif isinstance(step, LowRank):
        assert (step.whiten, step.factors, step.alpha, step.form) == ("none", "separate", 0.15, "factored"), name
        assert step.rank != "optimal", name
    elif isinstance(step, LayerDrop | BlockDrop):
        assert step.rerank == "none", name
        assert not isinstance(step, LayerDrop) or (not step.blocks and (step.metric == "residual" or "by output" in name)), name
    elif isinstance(step, Quantize):
        assert (step.bits, step.group, step.method, step.scope) == (4, 128, "awq", "experts"), name
    else:
        assert isinstance(step, WeightPrune) and (step.compare, step.scope) == ("row", "experts"), name


@pytest.fixture
def rows() -> Iterator[dict[str, dict[str, Any]]]:
    sys.path.insert(0, str(SCRIPTS))
    like = {"moe_i2": "Mixtral-8x7B", "holistic": "Mixtral-8x7B", "moe_pruner": "Mixtral-8x7B"}
    yield {name: importlib.import_module(name).recipes(model, 160) for name, model in like.items()}
    sys.path.remove(str(SCRIPTS))


def test_the_papers_rows_have_the_papers_fields(rows: dict[str, dict[str, Any]]) -> None:
    trained = []
    for script, found in rows.items():
        for name, body in found.items():
            if any(word in name for word in ("ours", "relative", "shared")):
                continue
            parsed = recipe.load(body)
            check(parsed.steps, f"{script}: {name}")
            if parsed.recover is not None:
                trained.append((script, parsed.recover))
    methods = {(script, spec.method) for script, spec in trained}
    assert methods == {("moe_i2", "lora"), ("holistic", "sft"), ("moe_pruner", "experts")}
    for script, spec in trained:
        if script != "moe_i2":
            assert (spec.peak, spec.epochs, spec.temperature) == (2e-5, 3, 1.0)
        assert spec.stream is (False if script == "moe_pruner" else None)
    json.dumps(rows)


def test_rows_that_are_not_the_papers_say_so(rows: dict[str, dict[str, Any]]) -> None:
    """The check above can fail: on every row it leaves out, but for those that only train otherwise."""
    for script, found in rows.items():
        for name, body in found.items():
            if any(word in name for word in ("ours", "relative", "shared")) and not name.endswith(("finetuned, ours", "distilled, ours")):
                with pytest.raises(AssertionError):
                    check(recipe.load(body).steps, f"{script}: {name}")


@pytest.mark.parametrize("name", ["moe-i2-paper", "holistic-paper", "moe-pruner-paper", "naee"])
def test_the_papers_recipes_have_the_papers_fields(name: str) -> None:
    parsed = paper(name)
    if name != "naee":  # whose counts are equal, so that a cap has nothing to hold
        check(parsed.steps, name)
    assert (parsed.calibration.samples, parsed.calibration.length) == (128, 2048)
    recover = parsed.recover
    if name == "moe-i2-paper":
        drop, rank = parsed.steps
        assert isinstance(drop, ExpertDrop) and (drop.counts, drop.score) == ("importance", "leave_one_out")
        assert isinstance(rank, LowRank) and rank.rank == "importance"
        assert recover is not None and recover.method == "lora"
    elif name == "moe-pruner-paper":
        assert recover is not None and (recover.method, recover.stream, recover.samples, recover.epochs, recover.peak) == (
            "experts", False, 1000, 3, 2e-5,
        )  # fmt: skip
    elif name == "naee":
        (drop,) = parsed.steps
        assert isinstance(drop, ExpertDrop) and type(drop.search).__name__ == "Exhaustive"
        assert drop.counts == "uniform" and not drop.protect_super_experts and not drop.cross_check


def test_a_bare_expert_drop_compares_layers_by_the_raw_norm() -> None:
    assert (ExpertDrop(ratio=0.25).normalize, ExpertDrop(ratio=0.25).counts) == ("none", "importance")
