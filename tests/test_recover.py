"""Recovery training: what it computes, what it changes on disk and what not, and that a killed run ends in the same bytes."""

from __future__ import annotations

import importlib
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import families
import peft
import pytest
import torch
from refusals import FACTORED, UNIFORM, snapshot
from safetensors.torch import load_file, save_file

import trimoe
from trimoe import UserError
from trimoe.checkpoint.folder import Checkpoint
from trimoe.model.skeleton import Skeleton
from trimoe.output import card
from trimoe.plan import limits, memory, recovery_memory
from trimoe.progress import Reporter
from trimoe.recipe.recover import parsed, schedule
from trimoe.recover import adapters, apart, head, layers, loop
from trimoe.recover.run import recover
from trimoe.recover.teacher import Kept, distillation, keep

JOB = importlib.import_module("trimoe.recover.run")
UNEVEN = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "importance", "search": "greedy"}}, {"low_rank": {"ratio": 0.4}}]}
SPARSE = {"steps": [{"weight_prune": {"ratio": 0.5}}]}
PACKED = {"steps": [{"quantize": {"bits": 4, "group": 8}}]}
CASES = {
    "mixtral": ("mixtral", UNIFORM), "qwen2_moe": ("qwen2_moe", UNIFORM), "gpt_oss": ("gpt_oss", UNIFORM),
    "deepseek_v2": ("deepseek_v2", UNIFORM), "factored": ("mixtral", FACTORED), "uneven": ("qwen2_moe", UNEVEN),
}  # fmt: skip
Finished = Callable[..., Path]


class Heard(Reporter):
    """Quiet, but keeps what it was to say in the list it is given."""

    def __init__(self, said: list[str]):
        super().__init__("quiet")
        self.said = said

    def say(self, message: str) -> None:
        super().say(message)
        self.said.append(message)


@pytest.fixture(scope="session")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that a model can learn in a few steps."""
    path = tmp_path_factory.mktemp("repetitive") / "text.txt"
    path.write_text("the cat sat on the mat and the dog lay by the door. " * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, family_folder: Callable[[str], Path], text_file: Path) -> Finished:
    """A compressed tiny model. Tests must not write into it."""
    built: dict[str, Path] = {}

    def get(family: str, recipe: dict[str, Any] = UNIFORM) -> Path:
        key = family + json.dumps(recipe)
        if key not in built:
            out = tmp_path_factory.mktemp("finished") / family
            trimoe.compress(family_folder(family), recipe, out, calibration=[str(text_file)], samples=4, length=32)
            built[key] = out
        return built[key]

    return get


def section(method: str, text: Path, **fields: Any) -> dict[str, Any]:
    small = {"data": str(text), "samples": 24, "length": 32, "batch": 4, "holdout": 0.2, "rank": 4, "rate": 3e-3, "epochs": 2}
    return {"method": method, **small, **fields}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def changed(before: Path, after: Path) -> set[str]:
    a, b = tensors(before), tensors(after)
    assert {key: (t.shape, t.dtype) for key, t in a.items()} == {key: (t.shape, t.dtype) for key, t in b.items()}
    return {key for key in a if not torch.equal(a[key], b[key])}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).view(2, 20)).logits


def test_too_few_samples_for_the_steps_asked_for_are_said(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recover(
        finished("mixtral"), tmp_path / "out", section("router", repetitive, samples=8, batch=8, epochs=1, steps=5), reporter=Heard(said)
    )
    (line,) = [line for line in said if "asked for" in line]
    assert line == "There is room for only 1 of the 5 steps asked for in 1 epoch of 6 samples in batches of 6; give more epochs."


# ---- distillation


def test_distillation_is_the_exact_divergence_when_every_token_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 5, 17, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    for temperature in (1.0, 2.5):
        log_p, log_q = (x.div(temperature).log_softmax(-1) for x in (teacher, student))
        exact = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        found = distillation(student, keep(teacher, temperature, 100), temperature)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_pooled_distillation_against_the_definition(scale: float) -> None:
    """One class for what is not kept; with steep distributions, that class has next to no probability."""
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(3, 4, 29, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    kept, total = keep(teacher, 2.0, 5), 0.0
    for p, q in zip((teacher / 2).softmax(-1).view(-1, 29), (student / 2).softmax(-1).view(-1, 29), strict=True):
        best = p.argsort(descending=True)[:5].tolist()
        others = [i for i in range(29) if i not in best]
        pairs = [(p[i], q[i]) for i in best] + [(p[others].sum(), q[others].sum())]
        total += float(sum(a * (a / b).log() for a, b in pairs))
    assert float(distillation(student, kept, 2.0)) == pytest.approx(4 * total / 12, rel=1e-4)
    leaf = student.float().requires_grad_()
    distillation(leaf, kept, 2.0).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and bool(leaf.grad.any())


def test_a_model_is_at_no_distance_from_itself() -> None:
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    assert abs(float(distillation(x, keep(x, 1.5, 7), 1.5))) < 1e-5
    other = x.clone()
    other[..., 0] += 1
    assert float(distillation(other, keep(x, 1.5, 7), 1.5)) > 1e-3


# ---- what changes on disk


@pytest.mark.parametrize("case", CASES)
def test_merged_adapters_change_what_they_should_and_nothing_else(
    case: str, finished: Finished, repetitive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = finished(*CASES[case]), {}
    merged = adapters.merged

    def spy(adapted: Any) -> Any:
        seen["logits"] = logits(adapted)
        return merged(adapted)

    monkeypatch.setattr(adapters, "merged", spy)
    result = recover(folder, tmp_path / "out", section("lora", repetitive, length=24))
    assert result.metrics["after"]["perplexity"] < 0.9 * result.metrics["before"]["perplexity"]
    assert result.metrics["expert_share"] == 1.0
    expected = {
        key for key, tensor in tensors(folder).items()
        if tensor.dim() >= 2 and not any(part in key for part in ("embed", "lm_head", "norm", "gate.weight", "router", "_bias"))
        and tensor.shape[0] > 1 and tensor.any()  # a gate; a guard of native checkpoints
    }  # fmt: skip
    assert changed(folder, tmp_path / "out") == expected
    torch.testing.assert_close(logits(trimoe.load(tmp_path / "out")), seen["logits"], atol=1e-4, rtol=1e-4)
    record = json.loads((tmp_path / "out" / "trimoe.json").read_text())
    assert record["recovered"][0]["method"] == "lora" and record["decisions"]
    assert "## Recovered" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v2", "uneven"])
def test_router_distillation_changes_routers_only(case: str, finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder = finished(*CASES[case])
    result = recover(folder, tmp_path / "out", section("router", repetitive, samples=60, rate=1e-3, epochs=8, patience=20))
    moved = changed(folder, tmp_path / "out")
    assert moved == {key for key in tensors(folder) if key.endswith(".gate.weight") and tensors(folder)[key].dim() == 2}
    assert result.metrics["after"]["kl"] < result.metrics["before"]["kl"]


@pytest.mark.parametrize("case", ["qwen2_moe", "gpt_oss", "uneven"])
def test_kept_adapters_load_beside_the_untouched_folder(case: str, finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder = finished(*CASES[case])
    before = snapshot(folder)
    recover(folder, tmp_path / "merged", section("lora", repetitive))
    recover(folder, tmp_path / "adapter", section("lora", repetitive, adapter=True))
    assert snapshot(folder) == before
    model = peft.PeftModel.from_pretrained(trimoe.load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(trimoe.load(tmp_path / "merged")), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(trimoe.load(folder)), atol=1e-2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.resolve())


def test_targets_spare_routers_gates_and_head(finished: Finished) -> None:
    """As target_modules, peft would take a shared expert's gate_proj for the stacked experts of all layers."""
    folder = finished("qwen2_moe")
    model, skeleton = trimoe.load(folder), Skeleton.of(str(folder))
    wanted = adapters.targets(model, skeleton)
    assert not [name for name in wanted.weights if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight", "lm_head.weight"))]
    assert "model.layers.0.mlp.shared_expert.gate_proj.weight" in wanted.parameters
    adapted = adapters.attach(model, wanted, parsed({"method": "lora"}), 0)
    assert sorted(name for name, _ in adapters._reached(adapted)) == sorted(wanted.weights)
    torch.testing.assert_close(logits(adapted), logits(trimoe.load(folder)), atol=1e-5, rtol=1e-5)


def test_distilling_from_itself_stays_where_it_is(finished: Finished, text_file: Path, tmp_path: Path) -> None:
    folder = finished("mixtral")
    result = recover(folder, tmp_path / "out", section("logits", text_file), teacher=folder)
    assert abs(result.metrics["before"]["kl"]) < 1e-6 and abs(result.metrics["after"]["kl"]) < 1e-6
    torch.testing.assert_close(logits(trimoe.load(tmp_path / "out")), logits(trimoe.load(folder)), atol=2e-2, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"train": "full", "rate": 1e-3}])
def test_distillation_comes_nearer_to_the_original(fields: dict[str, Any], finished: Finished, text_file: Path, tmp_path: Path) -> None:
    folder = finished("mixtral", FACTORED)
    result = recover(folder, tmp_path / "out", section("logits", text_file, samples=48, epochs=6, top_k=16, **fields))
    assert result.metrics["after"]["kl"] < 0.95 * result.metrics["before"]["kl"]
    assert len(changed(folder, tmp_path / "out")) > 10


@pytest.mark.parametrize("case", ["mixtral", "uneven"])
def test_experts_with_the_language_loss_in_memory(case: str, finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder = finished(*CASES[case])
    result = recover(folder, tmp_path / "out", section("experts", repetitive, stream=False))
    assert result.metrics["after"]["perplexity"] < result.metrics["before"]["perplexity"]
    assert result.metrics["factor"] > 0 and all(".experts." in key for key in changed(folder, tmp_path / "out"))


def test_experts_streamed(finished: Finished, text_file: Path, tmp_path: Path) -> None:
    folder = finished("mixtral", FACTORED)
    result = recover(folder, tmp_path / "out", section("experts", text_file))
    assert result.metrics["after"]["expert_error"] < result.metrics["before"]["expert_error"]
    moved = changed(folder, tmp_path / "out")
    assert moved and all(".experts." in key for key in moved)


def test_a_run_that_only_harms_gives_the_folder_back(finished: Finished, text_file: Path, tmp_path: Path) -> None:
    folder = finished("mixtral")
    result = recover(folder, tmp_path / "out", section("logits", text_file, rate=0.1, warmup=0.0, patience=1), teacher=folder)
    assert result.metrics["curve"][1]["kl"] > 1e-3 and result.metrics["best"] == 0 and result.metrics["after"] == result.metrics["before"]
    assert changed(folder, tmp_path / "out") == set()
    assert "Nothing that training tried was better on held-out text" in (tmp_path / "out" / "README.md").read_text()
    told = {"layers": {"0": {"before": 1.0, "after": 0.5}, "1": {"before": 0.0, "after": 0.0}, "2": {"before": 1.0, "after": 1.0}}}
    assert card.unimproved(told) == "Training made no better experts in layers 1, 2: they are as they were."
    told["layers"] = {"0": {"before": 0.0, "after": 0.0}}
    assert "nothing to learn" in str(card.unimproved(told))
    told["layers"] = {"0": {"before": 1.0, "after": 0.5}}
    assert card.unimproved(told) is None is card.unimproved({"best": 3})


# ---- what is held in memory


def noted(sizes: list[int], tensor: torch.Tensor) -> torch.Tensor:
    """Adds how many numbers a tensor holds, if it is not a parameter or a view of one."""
    base = tensor._base if tensor._is_view() else tensor
    sizes.append(0 if isinstance(base, torch.nn.Parameter) else tensor.numel())
    return tensor


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_adapters_beside_stacks_are_those_of_peft(family: str, finished: Finished) -> None:
    """The same outputs and gradients as peft's own way, without anything of a stack's size kept for the backward pass."""
    folder, found = finished(family), []
    for own in (True, False):
        model, skeleton = trimoe.load(folder).requires_grad_(False), Skeleton.of(str(folder))
        wanted = adapters.targets(model, skeleton)
        adapted = adapters.attach(model, wanted, parsed({"method": "lora", "rank": 3}), 0)
        generator = torch.Generator().manual_seed(1)
        trained = adapters.trainable(adapted)
        with torch.no_grad():
            for name, parameter in trained.items():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=generator)
        if not own:
            apart.put_back(adapted.trimoe_replaced)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(noted, kept), lambda tensor: tensor):
            out = adapted(input_ids=torch.arange(3, 19).view(1, 16)).logits
        out.square().sum().backward()
        found.append((out.detach(), {name: parameter.grad for name, parameter in trained.items()}, max(kept)))
    (ours, grads, largest), (theirs, expected, large) = found
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-3 * float(grad.abs().max()) + 1e-6, rtol=1e-3, msg=name)
    stack = 6 * 2 * 24 * 32
    assert largest < stack <= large, (largest, large)


@pytest.mark.parametrize("case", ["qwen2_moe", "factored"])
@pytest.mark.parametrize("fields", [{"method": "lora"}, {"method": "logits", "train": "full"}, {"method": "experts", "stream": False}])
def test_layers_that_compute_again_give_the_same_bytes(
    fields: dict[str, Any], case: str, finished: Finished, repetitive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec, called = finished(*CASES[case]), section(**{"text": repetitive, "epochs": 1, **fields}), []
    recover(folder, tmp_path / "once", spec)
    monkeypatch.setattr(recovery_memory, "computed_again", lambda *args: True)
    monkeypatch.setattr(
        layers, "checkpoint", lambda *args, **kwargs: (called.append(1), torch.utils.checkpoint.checkpoint(*args, **kwargs))[1]
    )
    recover(folder, tmp_path / "twice", spec)
    assert called and snapshot(tmp_path / "once") == snapshot(tmp_path / "twice")


STREAMED: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"method": "lora"}), ("factored", {"method": "logits"}), ("gpt_oss", {"method": "lora"}),
    ("mixtral", {"method": "router", "epochs": 2, "samples": 24}), ("uneven", {"method": "lora", "adapter": True}),
    ("mixtral", {"method": "lora", "dtype": "bfloat16"}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "fields"), STREAMED, ids=str)
def test_layers_read_as_they_run_give_the_same_bytes(
    case: str, fields: dict[str, Any], finished: Finished, repetitive: Path, tmp_path: Path
) -> None:
    """Only the section itself, and what is recorded of the form, differ."""
    folder, made = finished(*CASES[case]), []
    for stream in (False, True):
        out = tmp_path / str(stream)
        result = recover(folder, out, section(**{"text": repetitive, "epochs": 1, "samples": 16, "stream": stream, **fields}))
        record = json.loads((out / ("recovered.json" if "adapter" in fields else "trimoe.json")).read_text())
        assert (record if "adapter" in fields else record["recovered"][-1])["streamed"] is stream
        assert result.metrics["best"] > 0, "it should have learned something"
        made.append((tensors(out), result.metrics))
    (a, of_a), (b, of_b) = made
    assert of_a == of_b and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_pruned_weights_get_no_adapters_where_layers_are_read_as_they_run(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    said: list[str] = []
    spec = section("lora", repetitive, samples=16, epochs=1, stream=True)
    recover(finished("mixtral", SPARSE), tmp_path / "out", spec, reporter=Heard(said))
    assert any("would fill pruned zeros" in line for line in said)
    assert not any("experts" in key for key in changed(finished("mixtral", SPARSE), tmp_path / "out"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_one_layer_is_in_memory_at_a_time(family: str, finished: Finished) -> None:
    """Whenever a layer's weights have come, forwards and backwards, those of all others are gone."""
    skeleton = Skeleton.of(str(finished(family)))
    offloaded = layers.Offloaded(skeleton, [], "cpu")
    spec = parsed({"method": "lora", "rank": 2})
    model = adapters.attach(offloaded.model, adapters.targets(offloaded.model, skeleton), spec, seed=0)
    seen, order, filled = list[tuple[int, Any]](), list[int](), offloaded._filled

    @contextmanager
    def noted(index: int) -> Iterator[None]:
        with filled(index):
            alive = {number for number, weight in seen if weight() is not None}
            assert alive <= {index}, f"layers {alive} are in memory beside {index}"
            order.append(index)
            seen.extend((index, weakref.ref(module._parameters[leaf])) for _, module, leaf, _ in offloaded._places[index])
            yield

    offloaded._filled = noted  # type: ignore[method-assign]
    loop.text_loss(model, torch.arange(3, 43).view(2, 20), [0, 1]).backward()
    count = len(skeleton.layers)
    assert order == [*range(count), *reversed(range(count))] and not [weight for _, weight in seen if weight() is not None]
    assert all(parameter.grad is not None for parameter in adapters.trainable(model).values())
    outside = {name for name, weight in model.named_parameters() if not weight.requires_grad and weight.untyped_storage().nbytes() > 8}
    assert not [name for name in outside if f".{skeleton.prefix}." in name], "a frozen weight stayed"


def test_layers_are_read_as_they_run_where_the_model_does_not_fit(
    finished: Finished, repetitive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished("mixtral")
    fields = section("router", repetitive, samples=16, epochs=1)
    student, said = Skeleton.of(str(folder)), list[str]()
    whole, part = (
        memory.of_training(student, student, parsed({**fields, "stream": stream}), "cpu")[0].host["recovery"] for stream in (False, True)
    )
    assert part < whole
    monkeypatch.setattr(limits, "host", lambda: (part + whole) // 2)
    planned = trimoe.plan(str(folder), {**UNIFORM, "recover": fields})
    assert planned.memory_split["recovery"] <= limits.host()
    assert [line for line in planned.warnings if "its layers are read from the files as they run" in line]
    recover(folder, tmp_path / "out", fields, reporter=Heard(said))
    assert json.loads((tmp_path / "out" / "trimoe.json").read_text())["recovered"][-1]["streamed"]
    (line,) = [line for line in said if "read from the files as they run" in line]
    assert line.startswith("Recovery with the whole model in memory takes up to") and line in (tmp_path / "out" / "trimoe.log").read_text()
    for other in ({**fields, "stream": False}, {**fields, "method": "sft"}):
        with pytest.raises(UserError, match="adapters or router in the place of all weights"):
            recover(folder, tmp_path / "other", other)
    monkeypatch.setattr(limits, "host", lambda: part - 1)
    with pytest.raises(UserError, match="The recovery stage takes up to"):
        recover(folder, tmp_path / "other", fields)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_losses_of_logits_in_pieces(family: str, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """granitemoe scales its logits after the head."""
    model = trimoe.load(family_folder(family))
    ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
    teacher = keep(torch.randn(2, 11, 96, generator=torch.Generator().manual_seed(1)), 2.0, 7)
    whole = model(input_ids=ids).logits
    expected = [
        torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), distillation(whole, teacher, 2.0),
    ]  # fmt: skip
    monkeypatch.setattr(head, "LOGITS", 2 * 96 * 4)
    logits = head.Logits(model, ids)
    found = [loop.cross_entropy(logits), loop.divergence(logits, teacher, 2.0)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True) for loss in (ours, theirs)]
        for grad, reference in zip(*grads, strict=True):
            assert (grad is None) == (reference is None)
            if grad is not None:
                torch.testing.assert_close(grad, reference, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(loop.cross_entropy(head.Logits(model, ids)), expected[0])


BF16: list[dict[str, Any]] = [
    {"method": "lora"}, {"method": "router"}, {"method": "logits"}, {"method": "logits", "train": "full", "rate": 1e-3},
    {"method": "experts", "stream": False}, {"method": "experts"},
]  # fmt: skip


@pytest.mark.parametrize("fields", BF16, ids=str)
def test_computing_in_bfloat16(fields: dict[str, Any], finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    """What trains is float32 all the same, and a float32 checkpoint keeps the bits that the model did not compute with."""
    folder, seen = finished("mixtral", FACTORED), {}
    with pytest.MonkeyPatch.context() as patch:
        init = loop.Training.__init__

        def noted(self: loop.Training, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            seen["model"] = {parameter.dtype for parameter in self.job.model.parameters() if not parameter.requires_grad}
            seen["masters"] = {master.dtype for master in self.masters.values()}

        patch.setattr(loop.Training, "__init__", noted)
        result = recover(
            folder, tmp_path / "out", section(**{"text": repetitive, "epochs": 4, "samples": 48, "dtype": "bfloat16", **fields})
        )
    before, after = tensors(folder), tensors(tmp_path / "out")
    moved = changed(folder, tmp_path / "out")
    name = "expert_error" if fields == {"method": "experts"} else "kl" if fields["method"] in ("router", "logits") else "perplexity"
    assert moved and result.metrics["after"][name] < result.metrics["before"][name]
    if seen:
        assert seen["model"] <= {torch.bfloat16} and seen["masters"] == {torch.float32}
    assert all(not torch.equal(after[key].bfloat16().float(), after[key]) for key in moved if after[key].numel() > 100)
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - moved)


def test_other_dtypes_are_refused(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recover\.dtype: input should be 'float32' or 'bfloat16'"):
        recover(finished("mixtral"), tmp_path / "out", section("lora", repetitive, dtype="float16"))
    skeleton = Skeleton.of(str(finished("mixtral")))
    spec = parsed({"method": "lora"})
    assert recovery_memory.precision(spec, skeleton, "cuda") == recovery_memory.precision(spec, skeleton, "cpu") == torch.float32


def test_lambda_is_of_the_whole_first_batch(finished: Finished, repetitive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, spec = finished("mixtral", FACTORED), section("experts", repetitive, stream=False, steps=1)
    whole = recover(folder, tmp_path / "whole", spec).metrics["factor"]
    for share in (1, 3):
        monkeypatch.setattr(loop, "samples_at_once", lambda length, vocabulary, share=share: share)
        assert recover(folder, tmp_path / f"{share}", spec).metrics["factor"] == pytest.approx(whole, rel=1e-5)
    assert recover(folder, tmp_path / "other", spec, seed=1).metrics["factor"] != pytest.approx(whole, rel=1e-3)


# ---- interrupted and repeated runs


def test_the_advice_of_a_run_that_diverged_can_be_followed(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder, out, fields = finished("mixtral"), tmp_path / "out", section("lora", repetitive)
    with pytest.raises(UserError, match=r"Training diverged at step \d+: .*give a rate below 1e\+30"):
        trimoe.recover(folder, out, {**fields, "rate": 1e30})
    assert trimoe.recover(folder, out, {**fields, "rate": 1e-4}).metrics["trained"] > 0 and not (out / ".trimoe").exists()
    for name, value in (("rate", float("inf")), ("temperature", 1e-300)):
        with pytest.raises(UserError, match=name):
            trimoe.recover(folder, tmp_path / "no", {**section("logits", repetitive), name: value})
    assert not (tmp_path / "no").exists()
    recipe = {**SPARSE, "recover": {**fields, "rate": 1e30}}
    source, options = (
        json.loads((folder / "trimoe.json").read_text())["model"],
        {"calibration": [str(repetitive)], "samples": 4, "length": 32},
    )
    with pytest.raises(UserError, match="Training diverged"):
        trimoe.compress(source, recipe, tmp_path / "both", **options)
    trimoe.compress(source, {**SPARSE, "recover": {**fields, "rate": 1e-4}}, tmp_path / "both", **options)
    record = json.loads((tmp_path / "both" / "trimoe.json").read_text())
    assert record["recovered"][0]["spec"]["rate"] == record["recipe"]["recover"]["rate"] == 1e-4
    assert "rate': 0.0001" in record["command"] and "1e+30" not in (tmp_path / "both" / "README.md").read_text()


def test_the_original_is_not_run_again_for_another_rate(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder, out, fields = finished("mixtral"), tmp_path / "out", section("logits", repetitive)
    with pytest.raises(UserError, match="Training diverged"):
        trimoe.recover(folder, out, {**fields, "rate": 1e30})
    assert {path.name.split("-")[0] for path in (out / ".trimoe").iterdir()} == {"lock", "teacher"}
    trimoe.recover(folder, out, {**fields, "rate": 1e-4})
    assert (out / "trimoe.log").read_text().count("Keep its distributions: begins") == 1


def cut(patch: pytest.MonkeyPatch, step: int) -> None:
    optimise = loop.Training._optimise

    def dying(self: loop.Training) -> float:
        if self.step == step:
            raise RuntimeError("power cut")
        return optimise(self)

    patch.setattr(loop.Training, "_optimise", dying)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lora"}, {"method": "logits", "train": "full"}, {"method": "experts", "stream": False},
        {"method": "logits", "train": "full", "dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_resumed_training_writes_the_same_bytes(fields: dict[str, Any], finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder, spec = finished("mixtral", FACTORED), section(**{"text": repetitive, "patience": 20, **fields})
    torch.manual_seed(1)
    whole = recover(folder, tmp_path / "whole", spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY", 0.0)
        cut(patch, 6)
        torch.manual_seed(2)
        state = torch.random.get_rng_state()
        with pytest.raises(RuntimeError, match="power cut"):
            recover(folder, tmp_path / "cut", spec)
        assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(UserError, match="unfinished run with another recover"):
        recover(folder, tmp_path / "cut", {**spec, "rate": 1e-5})
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        optimise = loop.Training._optimise
        patch.setattr(loop.Training, "_optimise", lambda self: (steps.append(self.step), optimise(self))[1])
        resumed = recover(folder, tmp_path / "cut", spec)
    assert steps[0] == 6
    commands = [tmp_path / name for name in ("whole", "cut")]
    assert snapshot(commands[0]) == snapshot(commands[1])
    assert resumed.metrics == whole.metrics


def test_a_finished_recovery_is_left_alone(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder = finished("mixtral")
    for fields in ({}, {"adapter": True}):
        out, spec = tmp_path / str(len(fields)), section("lora", repetitive, steps=2, **fields)
        first = recover(folder, out, spec)
        before = snapshot(out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JOB, "_as_a_whole", None)
            assert recover(folder, out, spec).metrics == first.metrics
        assert snapshot(out) == before
        with pytest.raises(UserError, match="is not empty"):
            recover(folder, out, spec, seed=1)


def test_recoveries_follow_one_another(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder = finished("mixtral")
    recover(folder, tmp_path / "one", section("lora", repetitive))
    second = recover(tmp_path / "one", tmp_path / "two", section("router", repetitive))
    record = json.loads((tmp_path / "two" / "trimoe.json").read_text())
    assert [entry["method"] for entry in record["recovered"]] == ["lora", "router"]
    assert (tmp_path / "two" / "README.md").read_text().count("## Recovered") == 2
    assert second.metrics["after"]["kl"] <= second.metrics["before"]["kl"]


# ---- sparse and packed folders


@pytest.mark.parametrize("fields", [{"method": "logits", "train": "full"}, {"method": "lora"}, {"method": "experts", "stream": False}])
def test_pruned_zeros_stay(fields: dict[str, Any], finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder = finished("mixtral", SPARSE)
    result = recover(folder, tmp_path / "out", section(**{"text": repetitive, "samples": 48, "rate": 1e-3, "epochs": 4, **fields}))
    before, after = tensors(folder), tensors(tmp_path / "out")
    sparse = [key for key, tensor in before.items() if ".experts." in key and (tensor == 0).float().mean() > 0.4]
    assert sparse and all(bool((after[key][before[key] == 0] == 0).all()) for key in sparse)
    moved = changed(folder, tmp_path / "out")
    if fields["method"] == "lora":
        assert result.metrics["expert_share"] == 0 and moved and not [key for key in moved if ".experts." in key]
    else:
        assert set(sparse) <= moved


@pytest.mark.parametrize("fields", [{"method": "logits", "train": "full"}, {"method": "lora"}, {"method": "experts", "stream": False}])
def test_zeros_of_a_four_bit_grid_are_trained(fields: dict[str, Any], repetitive: Path, tmp_path: Path) -> None:
    """A checkpoint that was 4-bit floats before: a tenth of its experts' weights is zero, and nothing was pruned."""
    source, recipe = tmp_path / "source", {"steps": [{"expert_drop": {"ratio": 0.25, "score": "frequency", "counts": "uniform"}}]}
    families.save("mixtral", source, shard="1GB")
    given = tensors(source)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6]) / 6
    for key in given:
        if ".experts." in key:
            scale = given[key].abs().amax(-1, keepdim=True)
            given[key] = grid[((given[key] / scale).unsqueeze(-1) - grid).abs().argmin(-1)] * scale
    save_file(given, source / "model.safetensors", metadata={"format": "pt"})
    trimoe.compress(source, recipe, tmp_path / "small", calibration=[str(repetitive)], samples=4, length=32)
    said: list[str] = []
    result = recover(tmp_path / "small", tmp_path / "out", section(**{"text": repetitive, "rate": 5e-4, **fields}), reporter=Heard(said))
    before, after = tensors(tmp_path / "small"), tensors(tmp_path / "out")
    experts = [key for key in before if ".experts." in key]
    assert all((before[key] == 0).float().mean() > 0.05 for key in experts) and not [line for line in said if "zeros " in line.lower()]
    assert any((after[key][before[key] == 0] != 0).any() for key in experts)
    if fields["method"] == "lora":
        assert result.metrics["expert_share"] == 1.0


def test_zeros_of_an_earlier_run_stay(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    """Pruned across a layer, so that rows differ, and compressed again: the first run's recipe is in the second's record."""
    sparse = finished("mixtral", {"steps": [{"weight_prune": {"ratio": 0.1, "compare": "layer", "score": "magnitude"}}]})
    trimoe.compress(sparse, UNIFORM, tmp_path / "twice", calibration=[str(repetitive)], samples=4, length=32)
    said: list[str] = []
    spec = section("logits", repetitive, train="full", rate=1e-3)
    recover(tmp_path / "twice", tmp_path / "out", spec, reporter=Heard(said))
    before, after = tensors(tmp_path / "twice"), tensors(tmp_path / "out")
    assert all(bool((after[key][before[key] == 0] == 0).all()) for key in before if ".experts." in key)
    (line,) = [line for line in said if "stay zero" in line]
    assert line == "Zeros in 6 parameters stay zero: weight_prune made them."


def test_packed_folders_take_adapters_only(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder = finished("mixtral", PACKED)
    for fields in ({"method": "lora"}, {"method": "router"}, {"method": "experts"}):
        with pytest.raises(UserError, match="packed experts"):
            recover(folder, tmp_path / "no", section(**{"text": repetitive, **fields}))
    assert not (tmp_path / "no").exists()
    result = recover(folder, tmp_path / "out", section("lora", repetitive, adapter=True, epochs=6))
    assert result.metrics["after"]["perplexity"] < result.metrics["before"]["perplexity"]
    model = peft.PeftModel.from_pretrained(trimoe.load(folder), tmp_path / "out")
    assert not torch.allclose(logits(model), logits(trimoe.load(folder)), atol=1e-3)


# ---- mistakes


def test_mistakes_are_refused_before_anything_is_written(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    folder, lora = finished("mixtral"), section("lora", repetitive)
    families.save("mixtral", tmp_path / "other", vocab_size=80)
    unfinished = Path(shutil.copytree(folder, tmp_path / "unfinished"))
    (unfinished / "config.json").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    out, cases = tmp_path / "out", [
        ("96 tokens, .* 80", folder, "out", section("logits", repetitive), {"teacher": tmp_path / "other"}),
        ("not a finished folder", unfinished, "out", lora, {}),
        ("not a finished folder", tmp_path / "other", "out", lora, {}),
        ("There is no folder", tmp_path / "nowhere", "out", lora, {}),
        ("is not empty", folder, "full", lora, {}),
        ("leave the teacher out", folder, "out", lora, {"teacher": folder}),
        ("train: full goes with", folder, "out", {**lora, "train": "full"}, {}),
        ("adapter: true .--adapter. keeps", folder, "out", {**lora, "method": "router", "adapter": True}, {}),
        ("recover.rank: .*greater than 0|recover.rank", folder, "out", {**lora, "rank": 0}, {}),
        ("stream: true leaves frozen weights in their files", folder, "out", {**lora, "method": "sft", "stream": True}, {}),
        ("packed experts, which stay packed", finished("mixtral", PACKED), "out", {**lora, "adapter": True, "stream": True}, {}),
        ("cannot be used here", folder, "out", lora, {"device": "cuda:99"}),
    ]  # fmt: skip
    for message, source, target, spec, options in cases:
        with pytest.raises(UserError, match=message):
            recover(source, tmp_path / target, spec, **options)
    with pytest.raises(UserError, match="never written to"):
        recover(folder, folder / "inside", lora)
    assert not out.exists() and sorted(path.name for path in (tmp_path / "full").iterdir()) == ["file"]


def test_without_peft_the_sentence_says_what_to_install(
    finished: Finished, repetitive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'trimoe\[recover\]'"):
        recover(finished("mixtral"), tmp_path / "out", section("lora", repetitive))


def test_the_schedule_rises_and_falls() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.01
    assert [schedule(0, 1, warmup) for warmup in (0.0, 0.5)] == [1.0, 1.0]


def test_bf16_folders_keep_their_dtype(tmp_path: Path, repetitive: Path) -> None:
    families.save("mixtral", tmp_path / "source", dtype=torch.bfloat16)
    trimoe.compress(tmp_path / "source", UNIFORM, tmp_path / "small", calibration=[str(repetitive)], samples=4, length=32)
    recover(tmp_path / "small", tmp_path / "out", section("lora", repetitive))
    assert {info.dtype for info in Checkpoint.open(tmp_path / "out").stored.values()} == {"BF16"}
    assert changed(tmp_path / "small", tmp_path / "out")


def test_kept_is_moved_whole() -> None:
    kept = keep(torch.randn(1, 2, 5), 1.0, 3).to("cpu")
    assert isinstance(kept, Kept) and kept.value_BLK.shape == (1, 2, 3) and kept.index_BLK.dtype == torch.int32


def test_sft_takes_the_steps_of_adamw_on_the_text(finished: Finished, repetitive: Path, tmp_path: Path) -> None:
    """One step by hand: all weights, the next-token loss, the first rate of the schedule."""
    folder, spec = finished("mixtral"), section("sft", repetitive, steps=1, batch=4, warmup=0.0, clip=1e9)
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        loss = JOB.text_loss
        patch.setattr(JOB, "text_loss", lambda model, ids, samples: (seen.append(ids), loss(model, ids, samples))[1])
        result = recover(folder, tmp_path / "out", spec)
    assert result.metrics["best"] == 1 and len(seen) == 1
    model = trimoe.load(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model(input_ids=seen[0], labels=seen[0]).loss.backward()
    optimizer.step()
    after = trimoe.load(tmp_path / "out", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), parameter, rtol=1e-3, atol=1e-4, msg=name)
    assert parsed({"method": "sft"}).peak == 2e-5
    with pytest.raises(UserError, match="sft learns from the text alone"):
        recover(folder, tmp_path / "no", spec, teacher=folder)
