"""weight_prune, end to end: the weights that the papers' formulas name are zero on disk, all others bit for bit the source's.

Random weights have no ties; but scores are float32 in the product and float64 here, so weights whose scores lie within 1e-5 of each other
may change places (`lawful`).

Letters: O outputs, I inputs of a matrix, T tokens, S routed tokens of one expert.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import snapshot
from transformers import AutoModelForCausalLM

import trimoe
from trimoe import recipe as recipes
from trimoe.checkpoint import INDEX, Checkpoint
from trimoe.compress import calibration_for
from trimoe.errors import UserError
from trimoe.progress import QUIET
from trimoe.recipe import CalibrationSpec
from trimoe.running import PackedLinear
from trimoe.skeleton import Skeleton
from trimoe.stream import LayerWalk
from trimoe.write import Writer

ALL = sorted(families.FAMILIES)
# One matrix a key; transposed, interleaved, biased and stacked on disk; stacked; dense first layers; every second layer; a correction bias.
SPREAD = ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3", "jamba", "ernie4_5_moe"]
FEW = ["gpt_oss", "granitemoe", "qwen2_moe"]
IDS = torch.arange(3, 35).view(2, 16)
NEAR = 1e-5
Folder = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def step(**fields: Any) -> dict[str, Any]:
    return {"weight_prune": fields}


def named(value: Any) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def compress(source: Path, text: Path, out: Path, *steps: dict[str, Any], samples: int = 4, length: int = 32) -> trimoe.Result:
    return trimoe.compress(source, {"steps": list(steps)}, out, calibration=[str(text)], samples=samples, length=length)


def tokens(folder: Path, text: Path, samples: int = 4, length: int = 32) -> torch.Tensor:
    """What `compress` calibrates on."""
    spec = CalibrationSpec(data=[str(text)], samples=samples, length=length)
    return calibration_for(Skeleton.of(str(folder)), spec, 0, QUIET).samples_NL


def disk(folder: Path) -> Tensors:
    """The tensors as they lie in the files."""
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def dense(folder: Path) -> Tensors:
    """The tensors with bitmasks expanded: numpy's way."""
    raw, out = disk(folder), {}
    for key, tensor in raw.items():
        if key + "_bitmask" in raw:
            kept = torch.from_numpy(np.unpackbits(raw[key + "_bitmask"].numpy(), axis=-1, bitorder="little")).bool()
            out[key] = torch.zeros(kept.shape, dtype=tensor.dtype)
            out[key][kept] = tensor
        elif not key.endswith("_bitmask"):
            out[key] = tensor
    return out


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def whole_layers(skeleton: Skeleton) -> Iterator[tuple[int, torch.nn.Module]]:
    walk = LayerWalk(skeleton, [])
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            yield index, layer


def whole_stacks(folder: Path) -> dict[int, list[torch.Tensor]]:
    """`stacks` of every layer that has experts."""
    skeleton = Skeleton.of(str(folder))
    return {i: stacks(skeleton.sites[i].experts_of(layer)) for i, layer in whole_layers(skeleton) if i in skeleton.sites}


def streamed(folder: Path) -> torch.Tensor:
    walk = LayerWalk(Skeleton.of(str(folder)), [IDS])
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            walk.advance(index, layer)
    with walk.head() as head:
        return head(walk.hidden[0], 0)


def stacks(experts: Any) -> list[torch.Tensor]:
    """The first projections [E, O, H] and the last [E, H, I]."""
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return [tensor.detach().mT if experts.is_transposed else tensor.detach() for tensor in (first, experts.down_proj)]


@torch.no_grad()
def inputs_of(model: Any, module: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that the stock model's own forward calls a module with."""
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(lambda m, a, k: seen.append([*a, *k.values()]), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    (given,) = seen
    return [part.detach().clone() for part in given[:3]]


@torch.no_grad()
def scores(experts: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, gate_TK: torch.Tensor, score: str) -> list[list[torch.Tensor]]:
    """The papers' formula in float64, |w| sqrt(sum over the expert's tokens of (gate input)^2): for each expert, of its two matrices."""
    wide = copy.deepcopy(experts).double()
    out = []
    for expert, (w_in, w_out) in enumerate(zip(*stacks(wide), strict=True)):
        tokens, places = (index_TK == expert).nonzero(as_tuple=True)
        gate_S1 = gate_TK[tokens, places, None].double() if score == "moe_pruner" else torch.ones(len(tokens), 1)
        x_SH = x_TH[tokens].double()
        first_SO = x_SH @ w_in.T + (wide.gate_up_proj_bias[expert] if wide.has_bias else 0)
        both = []
        for weight, given in ((w_in, x_SH), (w_out, wide._apply_gate(first_SO))):
            norm_I = (gate_S1 * given).square().sum(0).sqrt()
            both.append(weight.abs() * (1 if score == "magnitude" or not len(tokens) else norm_I))
        out.append(both)
    return out


def lawful(score_OI: torch.Tensor, new_OI: torch.Tensor, old_OI: torch.Tensor, group: int, zeros: int) -> None:
    """In each `group` of weights exactly `zeros` are zero, and they have the lowest scores; the others are untouched."""
    gone = new_OI == 0
    assert torch.equal(new_OI, torch.where(gone, 0, old_OI)) and bool((old_OI != 0).all())
    gone_RN, score_RN = gone.reshape(-1, group), score_OI.reshape(-1, group)
    assert bool((gone_RN.sum(1) == zeros).all())
    highest_gone = score_RN.masked_fill(~gone_RN, 0).amax(1)
    assert bool((score_RN.masked_fill(gone_RN, torch.inf).amin(1) >= highest_gone * (1 - NEAR)).all())


# ---- the right weights


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


# ---- on disk


def expert_keys(folder: Path) -> set[str]:
    skeleton = Skeleton.of(str(folder))
    return {
        key for index, site in skeleton.sites.items() for path in site.weight_paths()
        for key in skeleton.source_keys(f"{skeleton.layer_name(index)}.{site.block}.{path}")
    }  # fmt: skip


def rows(tensor: torch.Tensor, family: str) -> torch.Tensor:
    """A matrix or stack of them as rows of inputs; gpt_oss keeps them the other way round."""
    turned = tensor.mT if family == "gpt_oss" else tensor
    return turned.reshape(-1, turned.shape[-1])


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
        assert view.keys() == wanted.keys()
        assert all(torch.equal(view[key], tensor) for key, tensor in wanted.items())
    assert model.generation_config.repetition_penalty == 1.25
    assert model.config.name_or_path == str(small)
    for (_, left), (_, right) in zip(*(whole_layers(Skeleton.of(str(out))) for out in (plain, small)), strict=True):
        assert all(torch.equal(*pair) for pair in zip(left.state_dict().values(), right.state_dict().values(), strict=True))
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
@pytest.mark.xdist_group("new process")
@pytest.mark.parametrize("how", ["remote", "stock"])
def test_bitmask_in_a_new_process(how: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """The code that lies beside the tensors reads them; stock code refuses them aloud."""
    folders = {family: tmp_path / family for family in ("mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "jamba")}
    for family, folder in folders.items():
        compress(family_folder(family), text_file, folder, step(ratio=0.5, form="bitmask"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", IN_NEW_PROCESS, how, *map(str, folders.values())]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
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
    assert source.nbytes - before == small.nbytes - after


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


# ---- matrices outside the experts

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
    for backend in ("auto", "dequantize"):
        one: Any = trimoe.load(out, backend=backend).get_submodule(min(found))
        given = torch.randn(2, one.in_features, requires_grad=True)
        if backend == "auto":
            with pytest.raises(UserError, match="Gradients do not pass"):
                one(given)
        else:
            one(given).sum().backward()
            assert bool(given.grad.abs().sum() > 0)  # type: ignore[union-attr]


# ---- resuming, other steps beside it


@pytest.mark.parametrize(("family", "fields", "after"), [
    ("gpt_oss", {"ratio": 0.5}, 2), ("gpt_oss", {"pattern": "2:4", "form": "bitmask"}, 3), ("jamba", {"ratio": 0.5, "compare": "layer"}, 3),
    *(("deepseek_v3", {"ratio": 0.5, "scope": "all-linear", "form": "bitmask"}, after) for after in (1, 2, 3)),
    ("deepseek_v3", {"ratio": 0.5, "scope": "all-linear", "score": "sparsegpt"}, 2),
], ids=named)  # fmt: skip
def test_resumed_run_writes_the_same_bytes(
    family: str, fields: dict[str, Any], after: int, family_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    source, put = family_folder(family), Writer.put

    def cut(self: Writer, group: int, made: Any = None) -> None:
        if group == after:
            raise RuntimeError("power cut")
        put(self, group, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimoe.layout.MAX_SHARD", 1)
        whole = compress(source, text_file, tmp_path / "whole", step(**fields))
        patch.setattr(Writer, "put", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            compress(source, text_file, tmp_path / "cut", step(**fields))
        patch.setattr(Writer, "put", put)
        resumed = compress(source, text_file, tmp_path / "cut", step(**fields))
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")
    assert json.dumps(resumed.metrics) == json.dumps(whole.metrics)


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
