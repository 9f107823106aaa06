"""weight_prune among other steps: resumed, after them, from a source that has bitmasks; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from runs import IDS, check_resumes, streamed
from zeros import Folder, compress, disk, file_bytes, named, stacks, step, whole_layers

import trimoe
from trimoe.errors import UserError
from trimoe.model.skeleton import Skeleton
from trimoe.recipe import recipe as recipes


@pytest.mark.parametrize(("family", "fields", "after"), [
    ("gpt_oss", {"ratio": 0.5}, 2), ("gpt_oss", {"pattern": "2:4", "form": "bitmask"}, 3), ("jamba", {"ratio": 0.5, "compare": "layer"}, 3),
    *(("deepseek_v3", {"ratio": 0.5, "scope": "all-linear", "form": "bitmask"}, after) for after in (1, 2, 3)),
    ("deepseek_v3", {"ratio": 0.5, "scope": "all-linear", "score": "sparsegpt"}, 2),
], ids=named)  # fmt: skip
def test_resumed_run_writes_the_same_bytes(
    family: str, fields: dict[str, Any], after: int, family_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    check_resumes(lambda out: compress(family_folder(family), text_file, out, step(**fields)), tmp_path, after)


COMBINED: dict[str, list[dict[str, Any]]] = {
    "uneven": [{"expert_drop": {"ratio": 0.4, "counts": "importance"}}, step(ratio=0.5)],
    "uneven, bitmask": [{"expert_drop": {"ratio": 0.4, "counts": "importance"}}, step(ratio=0.5, form="bitmask", scope="moe")],
    "layer": [{"layer_drop": {"count": 1}}, step(ratio=0.5, scope="all-linear")],
    "layer, bitmask": [{"layer_drop": {"count": 1}}, step(pattern="2:4", scope="all-linear", form="bitmask")],
    "block": [{"block_drop": {"count": 1}}, step(pattern="2:4", score="wanda")],
    "block, bitmask": [{"block_drop": {"count": 1}}, step(ratio=0.5, scope="all-linear", form="bitmask")],
    "merged": [{"low_rank": {"ratio": 0.3, "rank": "uniform", "form": "dense"}}, step(ratio=0.5, form="bitmask")],
}


@pytest.mark.parametrize(("family", "recipe"), [
    *(("qwen2_moe", recipe) for recipe in sorted(COMBINED)),
    *(("deepseek_v3", recipe) for recipe in ("uneven, bitmask", "layer, bitmask", "block, bitmask")),
])  # fmt: skip
def test_after_other_steps(family: str, recipe: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    source, out, steps = family_folder(family), tmp_path / "out", COMBINED[recipe]
    result, before = compress(source, text_file, out, *steps), trimoe.plan(str(source), {"steps": steps})
    assert result.plan.bytes == file_bytes(out)
    assert before.after.least_bytes <= file_bytes(out) <= before.after.file_bytes
    skeleton = Skeleton.of(str(out))
    for index, layer in whole_layers(skeleton):
        if index in skeleton.sites:
            for stack in stacks(skeleton.sites[index].experts_of(layer)):
                assert float((stack == 0).float().mean()) == 0.5
        attention: Any = layer.self_attn
        zeros = int((attention.o_proj.weight == 0).sum())
        assert zeros == (attention.o_proj.weight.numel() // 2 if "all-linear" in str(steps) else 0)
    with torch.no_grad():
        torch.testing.assert_close(trimoe.load(out)(IDS).logits, streamed(out), atol=1e-4, rtol=1e-4)
    assert trimoe.plan(str(out), {"steps": [step(ratio=0.5)]}).bytes


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("more", [
    {"expert_drop": {"count": 2, "counts": "uniform", "score": "frequency"}}, {"layer_drop": {"count": 1}}, step(pattern="2:4"),
], ids=lambda more: next(iter(more)))  # fmt: skip
def test_a_bitmask_folder_is_a_source_too(
    family: str, more: dict[str, Any], family_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    """Other steps read it as the dense one and write the same tensors, those that they only copy too."""
    found = []
    for form in ("dense", "bitmask"):
        compress(family_folder(family), text_file, tmp_path / form, step(ratio=0.25, form=form))
        result = compress(tmp_path / form, text_file, tmp_path / f"{form}-more", more)
        assert result.plan.bytes == file_bytes(tmp_path / f"{form}-more")
        found.append(disk(tmp_path / f"{form}-more"))
        trimoe.load(tmp_path / f"{form}-more")
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[1][key], tensor) for key, tensor in found[0].items())


# ---- input


@pytest.mark.parametrize(("family", "steps", "message"), [
    ("mixtral", [step()], "weight_prune: give ratio or pattern.$"),
    ("mixtral", [step(ratio=0.5, pattern="2:4")], "weight_prune: give ratio or pattern, not both.$"),
    ("mixtral", [step(pattern="two of four")], 'Pattern "two of four": give "n:m"'),
    ("mixtral", [step(pattern="4:2")], 'Pattern "4:2": give "n:m"'),
    ("mixtral", [step(pattern="4:4")], 'Pattern "4:4"'),
    ("mixtral", [step(pattern="2:5")], r"2:5 does not divide the experts' widths \[24, 32\]"),
    ("mixtral", [step(pattern="8:16")], r"8:16 does not divide the experts' widths \[24, 32\]"),
    ("mixtral", [step(ratio=1.0)], "ratio is 1.0; input should be less than 1"),
    ("mixtral", [step(ratio=0.5, score="hessian")], "score is 'hessian'"),
    ("mixtral", [step(ratio=0.5, compare="layer", form="bitmask")], "known beforehand"),
    ("mixtral", [step(ratio=0.5, score="sparsegpt", form="bitmask")], "known beforehand"),
    ("mixtral", [step(pattern="2:4", compare="layer")], "compare: layer goes with a ratio"),
    ("mixtral", [step(ratio=0.5, score="sparsegpt", compare="layer")], "compare: layer goes with a ratio"),
    ("mixtral", [{"low_rank": {"ratio": 0.3}}, step(ratio=0.5)], "use low_rank with form: dense"),
    ("mixtral", [step(ratio=0.5), {"expert_drop": {"ratio": 0.25}}], "weight_prune is fitted to the finished model.*expert_drop follows it"),
    ("mixtral", [step(ratio=0.5), {"block_drop": {"count": 1}}], "block_drop follows it"),
    ("mixtral", [step(ratio=0.5), step(ratio=0.5)], "weight_prune follows it"),
    ("mixtral", [step(ratio=0.5), {"quantize": {}}], "weight_prune is fitted.*quantize follows it"),
    ("mixtral", [{"quantize": {}}, step(ratio=0.5)], "quantize is fitted.*weight_prune follows it"),
])  # fmt: skip
def test_what_cannot_be_is_said_at_plan_time(family: str, steps: list[dict[str, Any]], message: str, family_folder: Folder) -> None:
    with pytest.raises(UserError, match=message) as caught:
        trimoe.plan(str(family_folder(family)), {"steps": steps})
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_widths_that_bitmasks_cannot_have(tmp_path: Path) -> None:
    families.save("mixtral", tmp_path / "odd", intermediate_size=20)
    with pytest.raises(UserError, match=r"multiples of 8; the experts' are \[20, 32\]"):
        trimoe.plan(str(tmp_path / "odd"), {"steps": [step(ratio=0.5, form="bitmask")]})
    assert trimoe.plan(str(tmp_path / "odd"), {"steps": [step(ratio=0.5)]}).bytes


def test_patterns_need_no_quotes(tmp_path: Path, family_folder: Folder) -> None:
    """YAML 1.1 reads 2:4 as 2 * 60 + 4."""
    path = tmp_path / "recipe.yaml"
    for text in ("2:4", "'2:4'", "4:8", "1:4"):
        path.write_text(f"steps:\n- weight_prune:\n    pattern: {text}\n")
        assert recipes.load(path).steps[0].pattern == text.strip("'")  # type: ignore[union-attr]
        changed = recipes.load({"steps": [{"weight_prune": {}}]}, changes=[f"steps.0.pattern={text}"])
        assert changed.steps[0].pattern == text.strip("'")  # type: ignore[union-attr]
        assert recipes.load(changed.to_json()) == changed
        assert trimoe.plan(str(family_folder("mixtral")), {"steps": [{"weight_prune": {}}]}, changes=[f"steps.0.pattern={text}"]).bytes
