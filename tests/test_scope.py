"""weight_prune and quantize outside the experts: attention, shared experts, dense MLPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from runs import IDS, streamed
from zeros import Folder, compress, dense, disk, expert_keys, file_bytes, inputs_of, lawful, named, rows, step, tokens

import trimoe
from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError
from trimoe.model.skeleton import Skeleton
from trimoe.run.kernels import PackedLinear

SHARED = ("shared_expert.", "shared_experts.", "shared_mlp.")


def outside(source: Path, scope: str) -> set[str]:
    """The disk keys that a scope adds: by their names alone."""
    found = set()
    for key, tensor in disk(source).items():
        router = key.endswith((".gate.weight", "shared_expert_gate.weight", ".router.weight", ".router.layer.weight"))
        wanted = scope == "all-linear" or any(part in key for part in SHARED)
        if wanted and ".layers." in key and tensor.dim() == 2 and key.endswith(".weight") and not router and ".experts." not in key:
            found.add(key)
    return found


NUMBERS = {
    "mixtral": (0, 12), "qwen2_moe": (9, 21), "deepseek_v3": (6, 21), "ernie4_5_moe": (6, 21), "granitemoe": (0, 12), "jamba": (0, 15),
}  # fmt: skip


@pytest.mark.parametrize(("family", "scope", "fields"), [
    (family, scope, fields) for families_, scope, fields in (
        (sorted(NUMBERS), "all-linear", {"ratio": 0.5}), (["qwen2_moe", "deepseek_v3", "ernie4_5_moe"], "moe", {"ratio": 0.5}),
        (["deepseek_v3", "granitemoe"], "all-linear", {"pattern": "2:4", "form": "bitmask", "score": "sparsegpt"}),
        (["qwen2_moe", "mixtral"], "moe", {"pattern": "2:4", "form": "bitmask", "score": "magnitude"}),
    ) for family in families_
], ids=named)  # fmt: skip
def test_scope(family: str, scope: str, fields: dict[str, Any], family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """Exactly those matrices have zeros, their share in every row; routers, embeddings and the head never."""
    source, out, steps = family_folder(family), tmp_path / "out", [step(**fields, scope=scope)]
    result, before = compress(source, text_file, out, *steps), trimoe.plan(str(source), {"steps": steps})
    assert before.bytes == result.plan.bytes == file_bytes(out)
    assert before.after.parameters == result.plan.after.parameters == before.before.parameters
    others = outside(source, scope)
    assert len(others) == NUMBERS[family][scope == "all-linear"]
    old, new, wanted = disk(source), dense(out), expert_keys(source) | others
    assert {key for key, tensor in old.items() if not torch.equal(tensor, new[key])} == wanted
    for key in wanted:
        found = rows(new[key], family)
        groups = found.reshape(-1, 4) if "pattern" in fields else found
        assert bool(((groups == 0).sum(1) == groups.shape[1] // 2).all()), key
    with torch.no_grad():
        torch.testing.assert_close(trimoe.load(out)(IDS).logits, streamed(out), atol=1e-4, rtol=1e-4)


def test_linears_are_pruned_by_their_own_inputs(family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """Attention and the dense MLP of deepseek_v3's layer 0, attention and the shared expert of layer 1: |w| times the norm of what each
    one is given, wherever the score is moe_pruner or wanda."""
    source, out = family_folder("deepseek_v3"), tmp_path / "out"
    compress(source, text_file, out, step(ratio=0.5, scope="all-linear"))
    model, ids = families.build("deepseek_v3"), tokens(source, text_file)
    small = trimoe.load(out)
    checked = 0
    for index in (0, 1):
        layer = model.model.layers[index]
        linears = {path: module for path, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        given = {path: inputs_of(model, module, ids)[0].double().flatten(0, -2) for path, module in linears.items()}
        for path, module in linears.items():
            new: Any = small.get_submodule(f"model.layers.{index}.{path}")
            score = module.weight.detach().double().abs() * given[path].square().sum(0).sqrt()
            lawful(score, new.weight.detach(), module.weight.detach(), module.in_features, module.in_features // 2)
            checked += 1
        layer.load_state_dict(small.get_submodule(f"model.layers.{index}").state_dict())
    assert checked == 14


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "jamba"])
def test_quantised_linears_run_packed(family: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    source, out = family_folder(family), tmp_path / "out"
    quantize = {"quantize": {"bits": 8, "method": "round", "scope": "all-linear", "group": 8}}
    result = compress(source, text_file, out, quantize)
    stored = set(Checkpoint.open(out).stored)
    named = {(index, path) for index, decision in result.decisions.items() for path in decision.linears}
    keys = {key.removesuffix(".weight") for key in outside(source, "all-linear")}
    packed = {key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")}
    experts = {key.removesuffix(".weight") for key in expert_keys(source)}
    inputs = {key: disk(source)[f"{key}.weight"].shape[1] for key in keys}
    assert packed - experts == {key for key in keys if inputs[key] % 8 == 0}  # jamba's dt_proj has 4
    assert not any(f"{key}.weight" in stored for key in packed)
    model, prefix = trimoe.load(out), Skeleton.of(str(source)).prefix
    found = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert found == {f"{prefix}.{index}.{path}" for index, path in named} and len(found) == len(packed - experts)
    assert all(model.get_submodule(name).weight.numel() == 0 for name in found)  # type: ignore[union-attr, operator]
    for backend in ("int8-dynamic", "dequantize"):
        one: Any = trimoe.load(out, backend=backend).get_submodule(min(found))
        given = torch.randn(2, one.in_features, requires_grad=True)
        if backend == "int8-dynamic":
            with pytest.raises(UserError, match="Gradients do not pass"):
                one(given)
        else:
            one(given).sum().backward()
            assert bool(given.grad.abs().sum() > 0)  # type: ignore[union-attr]


# ---- resuming, other steps beside it
