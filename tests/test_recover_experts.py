"""Expert-wise distillation: what it learns, what it leaves alone, where each expert came from."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from refusals import snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import trimoe
from trimoe import UserError
from trimoe.checkpoint.folder import Checkpoint
from trimoe.journal import Journal
from trimoe.model import transformers5
from trimoe.model.decision import LayerDecision
from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import FactoredExperts
from trimoe.output.record import Record
from trimoe.output.rewriter import Rewriter
from trimoe.progress import QUIET
from trimoe.recipe.recover import Recover
from trimoe.recover.experts import distil, expert_loss
from trimoe.recover.inputs import pruned
from trimoe.recover.pairs import Pair, pairs
from trimoe.recover.zeros import HeldZeros, zero_masks

Family = Callable[[str], Path]
PRUNED = [{"weight_prune": {"ratio": 0.5}}]
DROPPED = {"expert_drop": {"ratio": 0.25, "score": "frequency", "counts": "uniform"}}
FACTORED = {"steps": [DROPPED, {"low_rank": {"ratio": 0.4, "rank": "uniform"}}]}
SPEC = Recover(method="experts", epochs=3, batch=2, rate=3e-3)


def tokens(seed: int, batches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (16, 32), generator=generator) for _ in range(batches)]


TRAIN, HELD = tokens(1, 3), tokens(2, 1)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def is_expert(key: str) -> bool:
    return ".experts." in key


def with_record(folder: Path, source: Path, steps: list[dict[str, Any]]) -> None:
    """A trimoe.json that says that all experts have stayed."""
    decisions = {i: LayerDecision(keep=tuple(range(site.num_experts))).to_json() for i, site in Skeleton.of(str(source)).sites.items()}
    (folder / "trimoe.json").write_text(json.dumps({"recipe": {"steps": steps}, "decisions": decisions}))


def sparse_student(source: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The source with half of its experts' weights, the smallest, set to zero."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
        for key, tensor in tensors.items():
            if is_expert(key) and not key.endswith("bias"):
                tensors[key] = torch.where(tensor.abs() > tensor.abs().median(), tensor, 0)
        save_file(tensors, path, metadata={"format": "pt"})
    with_record(folder, source, PRUNED)
    return folder


def factored_student(source: Path, folder: Path, text: Path) -> Path:
    trimoe.compress(source, FACTORED, folder, calibration=[str(text)], samples=4, length=32)
    return folder


def recover(student: Path, teacher: Path, out: Path, spec: Recover = SPEC, *, seed: int = 0) -> dict[str, Any]:
    skeleton = Skeleton.of(str(student))
    rewriter = Rewriter(skeleton.checkpoint, out)
    with Journal(out, {}) as journal:
        rewriter.begin()
        metrics = distil(
            skeleton,
            Skeleton.of(str(teacher)),
            Record.found(student),
            spec,
            TRAIN,
            HELD,
            rewriter,
            journal,
            seed=seed,
            device="cpu",
            reporter=QUIET,
        )
        rewriter.finish({})
        journal.close()
    return metrics


# ---- a second opinion: stock modules in double precision, one expert at a time


def experts_of(folder: Path, dtype: torch.dtype = torch.float64) -> dict[int, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    return {index: site.experts_of(transformers5.decoder_layers(model)[1][index]) for index, site in Skeleton.of(str(folder)).sites.items()}


def called_with(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's experts are given on the held-out tokens, from the whole stock model."""
    model, site, calls = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), Skeleton.of(str(folder)).sites[layer], []
    experts = site.experts_of(transformers5.decoder_layers(model)[1][layer])
    experts.register_forward_pre_hook(lambda m, args, kwargs: calls.append((*args, *kwargs.values())[:2]), with_kwargs=True)
    with torch.no_grad():
        for batch in HELD:
            model(input_ids=batch)
    return torch.cat([x for x, _ in calls]), torch.cat([index for _, index in calls])


def slow_loss(teacher: Any, student: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, keep: tuple[int, ...]) -> torch.Tensor:
    def alone(experts: nn.Module, expert: int, x_SH: torch.Tensor) -> torch.Tensor:
        return experts(x_SH, torch.full((len(x_SH), 1), expert), torch.ones(len(x_SH), 1, dtype=torch.float64))

    total = torch.zeros((), dtype=torch.float64)
    for own, expert in enumerate(keep):
        mine = [x_H.double() for x_H, index_K in zip(x_TH, index_TK, strict=True) if expert in index_K.tolist()]
        if mine:
            x_SH = torch.stack(mine)
            total = total + (alone(student, own, x_SH) - alone(teacher, expert, x_SH).detach()).square().mean(1).mean()
    return total


# ---- training


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v2"])
def test_sparse_experts_learn_and_nothing_else_changes(family: str, family_folder: Family, tmp_path: Path) -> None:
    source, out = family_folder(family), tmp_path / "out"
    student = sparse_student(source, tmp_path / "student")
    before, given = (snapshot(source), snapshot(student)), tensors_of(student)
    metrics = recover(student, source, out)
    found = pairs(Record.read(student), Skeleton.of(str(source)), Skeleton.of(str(student)))
    assert [*metrics] == [str(index) for index in found] and len(metrics) >= 2
    teacher, learned = experts_of(source), experts_of(out)
    for index, pair in found.items():
        entry = metrics[str(index)]
        assert entry["after"] < 0.9 * entry["before"] and entry["steps"] == 72, metrics
        x_TH, index_TK = called_with(source, index)
        measured = slow_loss(teacher[index], learned[index], x_TH, index_TK, pair.keep).item()
        assert measured == pytest.approx(entry["after"], rel=1e-4)
    now = tensors_of(out)
    assert now.keys() == given.keys()
    for key, tensor in given.items():
        if is_expert(key):
            assert not torch.equal(now[key], tensor), f"{key} has learned nothing"
            if not key.endswith("bias"):
                assert bool((now[key][tensor == 0] == 0).all()), f"zeros of {key} have grown back"
        else:
            assert torch.equal(now[key], tensor), key
    assert (snapshot(source), snapshot(student)) == before
    differing = {name for name, digest in snapshot(out).items() if snapshot(student)[name] != digest}
    assert all(name.endswith(".safetensors") for name in differing) and snapshot(out).keys() == snapshot(student).keys()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_factored_experts_train_as_factors(family: str, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    source, out = family_folder(family), tmp_path / "out"
    student = factored_student(source, tmp_path / "student", text_file)
    given, record = tensors_of(student), Record.read(student)
    metrics = recover(student, source, out)
    teacher, learned, now = experts_of(source), experts_of(out), tensors_of(out)
    for index, pair in pairs(record, Skeleton.of(str(source)), Skeleton.of(str(student))).items():
        assert len(pair.keep) == 6 and metrics[str(index)]["after"] < metrics[str(index)]["before"]
        measured = slow_loss(teacher[index], learned[index], *called_with(source, index), pair.keep).item()
        assert measured == pytest.approx(metrics[str(index)]["after"], rel=1e-4)
    changed = {key for key in given if not torch.equal(now[key], given[key])}
    assert changed and changed == {key for key in given if key.endswith(("in_v", "in_u", "out_v", "out_u", "proj_bias"))}


def test_what_is_reported_is_what_was_written_in_half_precision(family_folder: Family, tmp_path: Path) -> None:
    source, out = family_folder("mixtral"), tmp_path / "out"
    metrics = recover(sparse_student(source, tmp_path / "student", torch.bfloat16), source, out)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_of(out).values())
    teacher, learned = experts_of(source), experts_of(out)
    for index, entry in metrics.items():
        measured = slow_loss(teacher[int(index)], learned[int(index)], *called_with(source, int(index)), tuple(range(8))).item()
        assert entry["after"] < entry["before"] and measured == pytest.approx(entry["after"], rel=1e-4)


def test_a_student_that_is_its_teacher_stays_as_it_is(family_folder: Family, tmp_path: Path) -> None:
    source = family_folder("qwen2_moe")
    metrics = recover(source, source, tmp_path / "out")
    assert all(entry == {"before": 0.0, "after": 0.0, "steps": 0} for entry in metrics.values()) and len(metrics) == 3
    assert snapshot(tmp_path / "out") == snapshot(source)


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_layers_that_only_get_worse_stay_as_they_are(rate: float, family_folder: Family, tmp_path: Path) -> None:
    source = family_folder("mixtral")
    student = sparse_student(source, tmp_path / "student")
    metrics = recover(student, source, tmp_path / "out", Recover(method="experts", batch=2, rate=rate, epochs=3, patience=2))
    assert all(entry["before"] == entry["after"] > 0 for entry in metrics.values())
    assert all(entry["steps"] == 14 for entry in metrics.values()), "two validations, seven steps apart"
    assert snapshot(tmp_path / "out") == snapshot(student)


def test_steps_end_training_of_each_layer(family_folder: Family, tmp_path: Path) -> None:
    source = family_folder("mixtral")
    student = sparse_student(source, tmp_path / "student")
    metrics = recover(student, source, tmp_path / "out", Recover(method="experts", batch=2, steps=4, rate=1e-3))
    assert [entry["steps"] for entry in metrics.values()] == [4, 4, 4]


@pytest.mark.parametrize("written", [True, False])
def test_a_killed_run_gives_the_same_bytes(written: bool, family_folder: Family, tmp_path: Path) -> None:
    """Killed before or after the second layer's entry in the journal, its tensors being written."""
    source = family_folder("gpt_oss")
    student = sparse_student(source, tmp_path / "student")
    spec = Recover(method="experts", batch=2, rate=1e-3, steps=4)
    whole = recover(student, source, tmp_path / "whole", spec)
    put = Journal.put

    def cut(self: Journal, stage: str, value: dict[str, Any]) -> None:
        if stage != "layer-1" or written:
            put(self, stage, value)
        if stage == "layer-1":
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "put", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            recover(student, source, tmp_path / "cut", spec)
    assert not (tmp_path / "cut" / "config.json").exists()
    trained: list[int] = []
    module = importlib.import_module("trimoe.recover.experts")
    with pytest.MonkeyPatch.context() as patch:
        real = module.learn
        patch.setattr(module, "learn", lambda *args, **kwargs: trained.append(1) or real(*args, **kwargs))
        assert recover(student, source, tmp_path / "cut", spec) == whole
    assert len(trained) == (1 if written else 2)
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")
    assert recover(student, source, tmp_path / "other", spec, seed=1) != whole


# ---- the loss


UNEVEN = ([3, -1, 0, 5, 2, -1, 4, 1], [-1, 2, 6, 0, -1, 3, 1, 2])  # -1: dense


def layouts(family: str, folder: Path, text: Path, tmp_path: Path) -> tuple[Any, Any, tuple[int, ...]]:
    """Layer 2's experts of the teacher and of a student in float64, and which of the teacher's they were."""
    teacher = experts_of(folder)[2]
    if family.endswith("+factored"):
        student = factored_student(folder, tmp_path / "student", text)
        return teacher, experts_of(student)[2], tuple(json.loads((student / "trimoe.json").read_text())["decisions"]["2"]["keep"])
    keep = (7, 2, 5, 0, 1, 6, 4, 3)  # not in order
    if family.endswith("+uneven"):
        uneven, generator = FactoredExperts(experts_of(folder)[2], *UNEVEN), torch.Generator().manual_seed(0)
        for parameter in uneven.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        return teacher, uneven, keep
    return teacher, experts_of(sparse_student(folder, tmp_path / "student"))[2], keep


LAYOUTS = ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v2", "mixtral+factored", "gpt_oss+factored", "mixtral+uneven", "gpt_oss+uneven"]


@pytest.mark.parametrize("family", LAYOUTS)
def test_expert_loss_and_its_gradient(family: str, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    folder = family_folder(family.partition("+")[0])
    teacher, student, keep = layouts(family, folder, text_file, tmp_path)
    x_TH, index_TK = called_with(folder, 2)
    x_TH, index_TK = x_TH[:48].double(), index_TK[:48]
    gradients = []
    for loss in (expert_loss(teacher, student, x_TH, index_TK, keep), slow_loss(teacher, student, x_TH, index_TK, keep)):
        student.zero_grad()
        loss.backward()
        gradients.append((loss.item(), {name: p.grad.clone() for name, p in student.named_parameters(recurse=False)}))
    (fast, grads), (slow, expected) = gradients
    assert fast == pytest.approx(slow, rel=1e-5) and slow > 0
    assert grads.keys() == expected.keys() and len(grads) >= 2
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7 * expected[name].abs().max().item(), msg=name)
    assert all(p.grad is None for p in teacher.parameters())


def test_expert_loss_without_tokens_is_zero(family_folder: Family) -> None:
    experts = experts_of(family_folder("mixtral"))[0]
    assert expert_loss(experts, experts, torch.randn(5, 32).double(), torch.zeros(5, 1, dtype=torch.long), (3,)).item() == 0


# ---- zeros


def test_masks_of_what_is_sparse() -> None:
    dense, few, sparse = torch.ones(10, 20), torch.ones(40, 50), torch.ones(10, 20)
    few[0, 0] = 0
    sparse[0, :2] = -0.0
    named = {"dense": dense, "few": few, "sparse": sparse, "stack": sparse.view(2, 5, 20), "bias": torch.zeros(9)}
    masks = zero_masks(named, lambda name: name != "few")
    assert masks.keys() == {"sparse", "stack"} and not zero_masks(named)
    assert torch.equal(masks["sparse"], sparse != 0) and masks["stack"].dtype == torch.bool


def on_grid(weight: torch.Tensor, levels: list[float], group: int) -> torch.Tensor:
    """Every `group` weights of a row rounded to the nearest of +-levels times their largest magnitude (of two levels, their mean one)."""
    parts = weight.unflatten(-1, (-1, group))
    grid = torch.tensor(levels + [-level for level in levels]) / max(levels)
    scale = parts.abs().mean(-1, keepdim=True) if len(levels) == 2 else parts.abs().amax(-1, keepdim=True)
    return (grid[((parts / scale).unsqueeze(-1) - grid).abs().argmin(-1)] * scale).flatten(-2)


GRIDS = {
    "mxfp4": ([0, 0.5, 1, 1.5, 2, 3, 4, 6], 32), "nvfp4": ([0, 0.5, 1, 1.5, 2, 3, 4, 6], 16), "int4": (list(range(8)), 32),
    "int4 rows": (list(range(8)), 256), "int3": (list(range(4)), 64), "ternary": ([0, 1], 256),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_of_a_grid_are_not_pruned(grid: str, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 96, 256, generator=torch.Generator().manual_seed(0))
    weight[:, :, 7] *= 6  # a loud input, as in real models
    rounded = on_grid(weight, *GRIDS[grid]).to(dtype)
    assert (rounded == 0).float().mean() > 0.05
    named = {"stack": rounded, "transposed": rounded.mT.contiguous(), "matrix": rounded[0]}
    assert not zero_masks(named), grid
    assert zero_masks(named, lambda name: True).keys() == named.keys()
    pruned = keep_half(rounded)
    assert zero_masks({"2:4": pruned, "transposed": pruned.mT.contiguous()}).keys() == {"2:4", "transposed"}


def keep_half(weight: torch.Tensor) -> torch.Tensor:
    """2 of every 4."""
    parts = weight.unflatten(-1, (-1, 4))
    return parts.scatter(-1, parts.abs().topk(2, -1, largest=False).indices, 0.0).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_is_seen_without_a_record(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 96, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    by_row = weight.scatter(-1, weight.abs().topk(26, -1, largest=False).indices, 0.0)  # a tenth of each row
    unstructured = torch.where(weight.abs() > 0.6, weight, 0)
    named = {"row": by_row, "column": by_row.mT.contiguous(), "unstructured": unstructured, "2:4": keep_half(weight), "none": weight * 0}
    assert zero_masks(named).keys() == named.keys()
    scattered = weight.masked_fill(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.1, 0)
    assert not zero_masks({"scattered": scattered, "dense": weight})


def test_which_scopes_were_pruned_is_in_the_record() -> None:
    step = {"weight_prune": {"ratio": 0.5}}
    cases = [
        ({"recipe": None}, set()), ({"recipe": {"steps": [step]}}, {"experts"}),
        ({"recipe": {"steps": [{"weight_prune": {"ratio": 0.0}}]}}, set()),
        ({"recipe": {"steps": [DROPPED]}, "earlier": [{"steps": [{"weight_prune": {"pattern": "2:4", "scope": "moe"}}]}, {"steps": []}]}, {"moe"}),
        ({"recipe": {"steps": None}, "earlier": ["broken", {"steps": ["odd"]}]}, set()),
    ]  # fmt: skip
    for body, scopes in cases:
        assert pruned(Record(Path(), body)) == scopes
    assert pruned(None) == set()


@pytest.mark.parametrize("held", [True, False])
def test_held_zeros_have_no_moments(held: bool) -> None:
    weight = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    weight.data[:, ::2] = 0
    zeros = HeldZeros({weight: weight.detach() != 0} if held else {})
    handles = zeros.register()
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (weight - 1).square().sum().backward()
        optimiser.step()
        weight.data += 0.01  # whatever else may move it
        zeros.hold()
    assert len(handles) == held
    assert bool((weight[:, ::2] == 0).all()) == held and bool((weight[:, 1::2] != 0).all())
    assert bool((optimiser.state[weight]["exp_avg_sq"][:, ::2] == 0).all()) == held


# ---- where experts came from


def matrices(experts: Any, expert: int) -> list[torch.Tensor]:
    return [parameter[expert] for _, parameter in sorted(experts.named_parameters(recurse=False))]


@pytest.mark.parametrize(
    ("family", "drop"),
    [
        ("mixtral", "block_drop"),
        ("qwen2_moe", "layer_drop"),
        ("mixtral", "layer_drop"),
        ("gpt_oss", "block_drop"),
        ("gpt_oss", "layer_drop"),
    ],
)
def test_pairs_of_students_with_fewer_layers(family: str, drop: str, text_file: Path, tmp_path: Path) -> None:
    source, student = tmp_path / "source", tmp_path / "student"
    model = families.build(family)
    for name, parameter in model.named_parameters():
        if ".layers.0." in name and ("o_proj" in name or "down_proj" in name):
            parameter.data *= 0.01  # the first layer adds next to nothing, so that it goes and the others are renumbered
    model.save_pretrained(source)
    families.tokenizer().save_pretrained(source)
    steps = [{drop: {"count": 1}}, DROPPED]
    result = trimoe.compress(source, {"steps": steps}, student, calibration=[str(text_file)], samples=4, length=32)
    assert [index for index, decision in result.decisions.items() if decision.gone] == [0]
    found = pairs(Record.read(student), Skeleton.of(str(source)), Skeleton.of(str(student)))
    assert [pair.teacher_layer for pair in found.values()] == [1, 2]
    assert [*found] == ([1, 2] if drop == "layer_drop" else [0, 1])
    teacher, own = experts_of(source), experts_of(student)
    for index, pair in found.items():
        assert len(pair.keep) == 6
        for number, expert in enumerate(pair.keep):
            for a, b in zip(matrices(own[index], number), matrices(teacher[pair.teacher_layer], expert), strict=True):
                assert torch.equal(a, b)
    # their experts are the teacher's own, so there is nothing to learn, which a wrong pairing would not find
    assert {entry["before"] for entry in recover(student, source, tmp_path / "out").values()} == {0.0}
    assert snapshot(tmp_path / "out") == snapshot(student)


def test_layers_without_experts_have_no_pair(family_folder: Family, tmp_path: Path) -> None:
    source = family_folder("deepseek_v2")
    student = sparse_student(source, tmp_path / "student")
    whole = tuple(range(8))
    for record in (None, Record.read(student)):
        assert pairs(record, Skeleton.of(str(source)), Skeleton.of(str(student))) == {1: Pair(1, whole), 2: Pair(2, whole)}


def refused(match: str, body: Any, teacher: Path, student: Path) -> None:
    with pytest.raises(UserError, match=match):
        pairs(None if body is None else Record(student, body), Skeleton.of(str(teacher)), Skeleton.of(str(student)))


def test_students_of_another_teacher_are_refused(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    source, student = family_folder("mixtral"), factored_student(family_folder("mixtral"), tmp_path / "student", text_file)
    record = json.loads((student / "trimoe.json").read_text())
    refused("has no trimoe.json .* has 6 of 8 experts where 8 were kept", None, source, student)
    refused("layer 0 would be its layer 0, but only one of them has experts", record, family_folder("deepseek_v2"), student)
    gone = {**record, "decisions": {**record["decisions"], "1": {"keep": [], "gone": "block"}}}
    refused("was not made from .* of its 3 layers 2 would be left, not 3", gone, source, student)
    refused("of its 3 layers", {**record, "decisions": {**record["decisions"], "7": {"keep": [0]}}}, source, student)
    far = {**record, "decisions": {**record["decisions"], "1": {"keep": [0, 1, 2, 3, 4, 8]}}}
    refused("layer 1, but has 6 of 8 experts", far, source, student)
    for damaged in ({}, {"decisions": []}, {"decisions": {}}, {"decisions": {"x": {}}}, {"decisions": {"0": {"keep": ["a"]}}}):
        refused("does not say what was decided", damaged, source, student)
    families.save("mixtral", tmp_path / "wide", intermediate_size=32)
    with_record(student, source, [])
    refused("its experts are 32 x 24, not 32 x 32", None, tmp_path / "wide", source)


def test_packed_experts_are_refused(family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    source, student = family_folder("mixtral"), tmp_path / "student"
    steps = {"steps": [{"quantize": {"bits": 4, "group": 8, "method": "round"}}]}
    trimoe.compress(source, steps, student, calibration=[str(text_file)], samples=4, length=32)
    assert Checkpoint.open(student).scheme is not None
    with pytest.raises(UserError, match="stored packed"):
        recover(student, source, tmp_path / "out")
