"""Zeros on disk: as they are, or as a bitmask and the weights that stay; in a new process, and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from forks import Forks
from runs import IDS, streamed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zeros import ALL, FEW, Folder, Tensors, compress, dense, disk, expert_keys, file_bytes, rows, step, whole_layers

import trimoe
from trimoe.checkpoint.folder import INDEX, Checkpoint
from trimoe.errors import UserError
from trimoe.model.skeleton import Skeleton


@pytest.mark.parametrize(("family", "form"), [*((family, "bitmask") for family in ALL), *((family, "dense") for family in FEW)])
def test_what_lies_on_disk(family: str, form: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    source, out, steps = family_folder(family), tmp_path / "out", [step(ratio=0.3, form=form)]
    result, before = compress(source, text_file, out, *steps), trimoe.plan(str(source), {"steps": steps})
    assert before.bytes == result.plan.bytes == file_bytes(out)
    assert before.form == result.plan.form == ("stock" if form == "dense" else "native")
    old, new, experts = disk(source), dense(out), expert_keys(source)
    assert set(new) == set(old)
    assert any(key.endswith("_bitmask") for key in disk(out)) == (form == "bitmask")
    for key, tensor in old.items():
        if key not in experts:
            assert torch.equal(new[key], tensor), key
            continue
        found = rows(new[key], family)
        assert bool(((found == 0).sum(1) == found.shape[1] * 3 // 10).all()), key
        assert torch.equal(new[key], torch.where(new[key] == 0, 0, tensor)), key


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "jamba"])
def test_bitmask_is_the_dense_form(family: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """However it is opened, bit for bit; and what is saved again is a dense folder that says so."""
    plain, small = tmp_path / "dense", tmp_path / "small"
    for out, form in ((plain, "dense"), (small, "bitmask")):
        compress(family_folder(family), text_file, out, step(pattern="2:4", form=form))
    (small / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.25, "eos_token_id": 2}))
    model: Any = trimoe.load(small)
    wanted: Tensors = trimoe.load(plain).state_dict()
    model.save_pretrained(tmp_path / "again")
    views = [
        model.state_dict(), AutoModelForCausalLM.from_pretrained(small).state_dict(), trimoe.load(tmp_path / "again").state_dict(),
        AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict(),
    ]  # fmt: skip
    for view in views:
        assert {key for key in view if not key.endswith(".trimoe_guard")} == wanted.keys()
        assert all(torch.equal(view[key], tensor) for key, tensor in wanted.items())
    assert model.generation_config.repetition_penalty == 1.25
    assert model.config.name_or_path == str(small)
    for (_, left), (_, right) in zip(*(whole_layers(Skeleton.of(str(out))) for out in (plain, small)), strict=True):
        held = right.state_dict()
        assert all(torch.equal(held[name], tensor) for name, tensor in left.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model.float()(IDS).logits, streamed(small), atol=1e-4, rtol=1e-4)


IN_NEW_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    if sys.argv[1] == "remote":
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, trust_remote_code=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        torch.save(model.state_dict(), folder + ".seen")
    else:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
        config = AutoConfig.from_pretrained(folder)
        for load in (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]):
            try:
                load.from_pretrained(folder, **({"trust_remote_code": False} if load is AutoModelForCausalLM else {}))
            except (RuntimeError, ValueError) as error:
                print("refused", type(error).__name__)
assert "trimoe" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["remote", "stock"])
def test_bitmask_in_a_new_process(how: str, family_folder: Folder, text_file: Path, with_transformers: Forks, tmp_path: Path) -> None:
    """The code that lies beside the tensors reads them; stock code refuses them aloud."""
    folders = {family: tmp_path / family for family in ("mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "jamba")}
    for family, folder in folders.items():
        compress(family_folder(family), text_file, folder, step(ratio=0.5, form="bitmask"))
    process = with_transformers.run("-c", IN_NEW_PROCESS, how, *folders.values())
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("refused") == (2 * len(folders) if how == "stock" else 0), process.stdout
    for folder in folders.values() if how == "remote" else ():
        seen, wanted = torch.load(f"{folder}.seen"), trimoe.load(folder).state_dict()
        assert seen.keys() == wanted.keys() and all(torch.equal(seen[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("fields", [{"ratio": 0.5}, {"pattern": "2:4"}, {"pattern": "2:4", "score": "sparsegpt"}])
def test_bitmask_is_nine_sixteenths(fields: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    """Half the values in 16 bits and one bit a weight; headers not counted."""
    families.save("mixtral", tmp_path / "source", dtype=torch.bfloat16)
    result = compress(tmp_path / "source", text_file, tmp_path / "out", step(**fields, form="bitmask"))
    assert result.plan.bytes == file_bytes(tmp_path / "out")
    experts, source, small = expert_keys(tmp_path / "source"), Checkpoint.open(tmp_path / "source"), Checkpoint.open(tmp_path / "out")
    before = sum(source.stored[key].nbytes for key in experts)
    after = sum(info.nbytes for key, info in small.stored.items() if key.removesuffix("_bitmask") in experts)
    assert after / before == 0.5625
    guards = sum(info.nbytes for key, info in small.stored.items() if key.endswith(".trimoe_guard"))
    assert 0 < guards == 2 * len(Skeleton(source).layers) and source.nbytes - before == small.nbytes - after - guards


def test_zeros_of_the_source_count_as_kept_where_there_is_room(text_file: Path, tmp_path: Path) -> None:
    families.save("mixtral", tmp_path / "source")
    for path in (tmp_path / "source").glob("*.safetensors"):
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if ".w1." in key or ".gate_proj." in key or "experts" in key:
                tensor[:, ::3] = 0
        save_file(tensors, path, {"format": "pt"})
    for form in ("dense", "bitmask"):
        result = compress(tmp_path / "source", text_file, tmp_path / form, step(ratio=0.25, form=form))
        assert result.plan.bytes == file_bytes(tmp_path / form)
    left, right = dense(tmp_path / "dense"), dense(tmp_path / "bitmask")
    assert left.keys() == right.keys() and all(torch.equal(right[key], tensor) for key, tensor in left.items())


@pytest.mark.parametrize("damage", ["dtype", "missing", "square", "few", "many"])
def test_damaged_bitmask_is_refused(damage: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    compress(family_folder("mixtral"), text_file, tmp_path / "out", step(ratio=0.5, form="bitmask"))
    (path,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(path)
    mask = next(key for key in tensors if key.endswith("_bitmask"))
    key = mask.removesuffix("_bitmask")
    values = tensors.pop(key)
    if damage == "dtype":
        tensors[mask] = tensors[mask].int()
    if damage != "missing":
        tensors[key] = {"square": values.view(2, -1), "few": values[:-1], "many": values.repeat(2)}.get(damage, values).contiguous()
    save_file(tensors, path, {"format": "pt"})
    if damage == "missing":
        index = json.loads((path.parent / INDEX).read_text())
        del index["weight_map"][key]
        (path.parent / INDEX).write_text(json.dumps(index))
    if damage not in ("few", "many"):
        with pytest.raises(UserError, match="no fitting values"):
            Checkpoint.open(path.parent)
        return
    with pytest.raises(UserError, match="values"):
        Checkpoint.open(path.parent).read(key)
    with pytest.raises(ValueError, match="values"):
        trimoe.load(path.parent)


# ---- experts without tokens, SparseGPT
