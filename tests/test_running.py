"""Packed checkpoints, run packed: against the dense model that holds the same (dequantised) weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trimoe
from trimoe.checkpoint.folder import Checkpoint
from trimoe.checkpoint.packed import Packed
from trimoe.run import bench, kernels
from trimoe.run.kernels import BACKENDS, choose
from trimoe.run.load import load_packed

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
SIZES: dict[str, dict[str, Any]] = {
    family: {"hidden_size": 64, "intermediate_size": 64, **({} if family in ("mixtral", "olmoe") else {"moe_intermediate_size": 64})}
    for family in FAMILIES
}
GROUP = 32
CPU = torch.device("cpu")
IDS = torch.arange(3, 35).view(2, 16)
EXPERT = re.compile(r"\.experts\.\d+\..*weight$")


def quantize(weight_OI: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> Packed:
    """Round to nearest, symmetric."""
    grouped = weight_OI.float().unflatten(1, (-1, group))
    scale = (grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)).to(dtype)
    q = (grouped / scale.float()).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    return Packed(q.flatten(1), scale.squeeze(-1), bits, group)


def save_packed(family: str, folder: Path, *, bits: int = 4, group: int = GROUP, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with its experts packed, in `folder`; returns the dense model that holds the dequantised weights."""
    dense = folder.parent / f"{folder.name}-dense"
    families.save(family, dense, shard="1GB", dtype=dtype, **{**SIZES[family], **changes})
    return pack_folder(dense, folder, bits, group)


def pack_folder(dense: Path, folder: Path, bits: int, group: int) -> Any:
    tensors, packed, rounded = load_file(dense / "model.safetensors"), {}, {}
    for key, tensor in tensors.items():
        if EXPERT.search(key):
            made = quantize(tensor, bits, group, tensor.dtype)
            packed |= {f"{key.removesuffix('weight')}{part}": value for part, value in made.tensors().items()}
            rounded[key] = made.dense()
        else:
            packed[key] = rounded[key] = tensor
    assert len(packed) > len(rounded)
    save_file(rounded, dense / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    for path in dense.iterdir():
        if path.suffix in (".json", ".py"):
            (folder / path.name).write_bytes(path.read_bytes())
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False}
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$", "re:.*shared_expert.*", r"re:.*mlp\.(gate|up|down)_proj$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return trimoe.load(dense)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """(folder, dense model of the same weights), each built once. Tests must not change either."""
    built: dict[Any, tuple[Path, Any]] = {}

    def get(family: str, bits: int = 4, dtype: torch.dtype = torch.float32, group: int = GROUP) -> tuple[Path, Any]:
        key = (family, bits, dtype, group)
        if key not in built:
            folder = tmp_path_factory.mktemp(family) / "packed"
            built[key] = folder, save_packed(family, folder, bits=bits, dtype=dtype, group=group)
        return built[key]

    return get


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits.float()


def distance(model: Any, reference: Any) -> float:
    """Relative error of a token's logits, the median over tokens: a near-tie in a router can send single tokens elsewhere."""
    expected = logits(reference)
    return float(((logits(model) - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_is_the_dense_model(made: Any, family: str, bits: int) -> None:
    folder, dense = made(family, bits)
    model = load_packed(folder, backend="dequantize")
    assert (logits(model) - logits(dense)).abs().max() <= 1e-5
    assert model.trimoe_quantized_share == 1.0 and set(model.trimoe_backends) == {"dequantize"} and not model.training
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id
    assert model.name_or_path == str(folder)


# On top of the dequantised weights. int8-dynamic rounds every activation to 7 bits of its token's largest (measured: 0.011 to 0.028 over
# all families) and regroups the weights; weight-only computes in bf16, 8 bits of mantissa (0.003 to 0.005). Weights of random models are
# the worst case: nothing averages out.
TOLERANCE = {"int8-dynamic": 0.05, "int4-weight-only": 0.01, "int8-weight-only": 0.01}


@pytest.mark.parametrize(("backend", "bits"), [("int8-dynamic", 4), ("int8-dynamic", 8), ("int4-weight-only", 4), ("int8-weight-only", 8)])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_close_to_the_dense_model(made: Any, family: str, backend: str, bits: int) -> None:
    folder, dense = made(family, bits)
    model = load_packed(folder, backend=backend)
    assert set(model.trimoe_backends) == {backend} and model.trimoe_quantized_share == 1.0
    assert 0 < distance(model, dense) <= TOLERANCE[backend]


@pytest.mark.parametrize("backend", ["int8-dynamic", "int4-weight-only", "dequantize"])
def test_bf16_models(made: Any, backend: str) -> None:
    folder, dense = made("qwen3_moe", 4, torch.bfloat16)
    model = load_packed(folder, backend=backend)
    assert model.dtype == torch.bfloat16 and model(IDS).logits.dtype == torch.bfloat16
    assert distance(model, dense) <= (0.05 if backend == "int8-dynamic" else 0.02)  # the dense one computes in bf16, too
    assert load_packed(folder, backend=backend, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))])
@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 128, 32), (48, 256, 128), (16, 96, 32)])
def test_int4_uses_the_stored_integers_and_scales(device: str, rows: int, columns: int, group: int) -> None:
    """Multiplying by the identity reads the matrix back: products of an integer of 4 bits with a bf16 scale, rounded once, to bf16."""
    generator, place = torch.Generator().manual_seed(0), torch.device(device)
    q_OI = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    packed = Packed(q_OI.to(place), torch.rand(rows, columns // group, generator=generator).bfloat16().to(place), 4, group)
    backend = choose("int4-weight-only", 4, group, (rows, columns), place)
    handle = backend.pack(packed)
    read = backend.linear(torch.eye(columns, dtype=torch.bfloat16, device=place), handle).T
    assert torch.equal(read, packed.dense())
    assert backend.nbytes(handle) == q_OI.numel() // 2 + packed.scale_OG.numel() * 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_every_backend_multiplies(device: str, bits: int, dtype: torch.dtype, tokens: int) -> None:
    generator, place, shape = torch.Generator().manual_seed(tokens), torch.device(device), (96, 128)
    packed = quantize(torch.randn(shape, generator=generator).to(place), bits, 64, torch.bfloat16)
    x_TI = torch.randn(tokens, shape[1], generator=generator).to(place, dtype)
    expected = x_TI.float() @ packed.dense().float().T
    able = [backend for backend in BACKENDS if backend.fits(bits, 64, shape, place)]
    assert len(able) == {"cpu": 3, "cuda": 2}[device]
    for backend in able:
        y_TO = backend.linear(x_TI, backend.pack(packed))
        assert y_TO.dtype == dtype and y_TO.shape == expected.shape
        assert (y_TO.float() - expected).norm() / expected.norm() <= 0.02, backend.name


def test_one_scale_a_row_is_kept_and_several_are_regrouped() -> None:
    one = quantize(torch.randn(32, 64), 8, 64, torch.float32)
    assert torch.equal(kernels.per_row(one)[0], one.q_OI) and torch.equal(kernels.per_row(one)[1], one.scale_OG[:, 0])
    several = quantize(torch.randn(32, 64), 4, 16, torch.float32)
    q_OI, scale_O = kernels.per_row(several)
    moved = (q_OI * scale_O.unsqueeze(1) - several.dense()).abs()
    assert bool((moved <= 1.001 * several.dense().abs().amax(1, keepdim=True) / 254).all())


def test_a_loud_token_does_not_coarsen_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = quantize(torch.randn(64, 128, generator=generator), 4, 32, torch.float32)
    backend = choose("int8-dynamic", 4, 32, (64, 128), CPU)
    x_TI, handle = torch.randn(8, 128, generator=generator), backend.pack(packed)
    alone, loud = backend.linear(x_TI, handle), backend.linear(torch.cat([x_TI, 1000 * x_TI[:1]]), handle)[:8]
    assert (alone - loud).norm() / alone.norm() <= 0.01


def test_the_users_quantized_engine_stays(made: Any) -> None:
    before, threads = torch.backends.quantized.engine, torch.get_num_threads()
    load_packed(made("mixtral")[0], backend="int8-dynamic")(IDS)
    assert torch.backends.quantized.engine == before and torch.get_num_threads() == threads


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("backend", ["dequantize", "int4-weight-only", "int8-dynamic"])
def test_generates_with_a_cache_as_without(made: Any, family: str, backend: str) -> None:
    model = load_packed(made(family)[0], backend=backend)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    cached, again = (model.generate(IDS[:1], use_cache=use_cache, **options) for use_cache in (True, False))
    near = [float((a - b).norm() / b.norm()) for a, b in zip(cached.logits, again.logits, strict=True)]
    if backend == "dequantize":
        assert torch.equal(cached.sequences, again.sequences) and max(near) <= 1e-4
    else:  # a token rounds a little differently alone than in company; once the chosen tokens differ, nothing can be compared
        assert torch.equal(cached.sequences, again.sequences) or near[0] <= 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_the_same_folder(made: Any, family: str) -> None:
    pytest.importorskip("compressed_tensors")
    folder, _ = made(family)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert distance(load_packed(folder, backend="dequantize"), stock) <= 1e-5


def test_no_float_weight_of_an_expert_is_left(made: Any) -> None:
    folder, dense = made("qwen3_moe")
    model = load_packed(folder, backend="int4-weight-only")
    experts = [module for module in model.modules() if hasattr(module, "trimoe_first")]
    assert [type(module).__name__ for module in experts] == ["Qwen3MoeExperts"] * 3
    assert all(parameter.numel() == 0 for module in experts for parameter in module.parameters())
    weights = sum(module.gate_up_proj.numel() + module.down_proj.numel() for module in dense.modules() if hasattr(module, "gate_up_proj"))
    assert model.trimoe_expert_bytes == weights // 2 + weights // GROUP * 4
    assert getattr(model.config, "quantization_config", None) is None and not getattr(model, "is_quantized", False)
    with pytest.raises(trimoe.UserError, match="copy the folder"):
        model.save_pretrained(folder / "again")


def test_layers_with_different_expert_counts(tmp_path: Path) -> None:
    families.save("qwen3_moe", tmp_path / "whole", **SIZES["qwen3_moe"])
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    step = {"expert_drop": {"ratio": 0.45, "counts": "importance", "search": "greedy"}}
    recipe = {"steps": [step], "calibration": {"data": [str(text)], "samples": 4, "length": 32}}
    out = tmp_path / "native"
    trimoe.compress(tmp_path / "whole", recipe, out)
    shards = {}
    for path in sorted(out.glob("*.safetensors")):
        shards |= load_file(path)
        path.unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(shards, out / "model.safetensors", metadata={"format": "pt"})
    dense = pack_folder(out, tmp_path / "packed", 4, GROUP)
    model = trimoe.load(tmp_path / "packed", backend="dequantize")
    counts = {len(module.trimoe_first) for module in model.modules() if hasattr(module, "trimoe_first")}
    assert len(counts) > 1
    assert (logits(model) - logits(dense)).abs().max() <= 1e-5


def test_auto_falls_back_where_a_kernel_cannot(made: Any) -> None:
    assert choose("auto", 4, 32, (64, 64), CPU).name == "int4-weight-only"
    assert choose("auto", 8, 32, (64, 64), CPU).name == "int8-weight-only"
    assert choose("auto", 8, 24, (64, 48), CPU).name == choose("auto", 4, 24, (64, 48), CPU).name == "dequantize"
    assert load_packed(made("mixtral")[0]).trimoe_backends == {"int4-weight-only": 48}
    assert choose("auto", 4, 16, (64, 64), torch.device("meta")).name == "dequantize"
    folder, dense = made("mixtral", 4, torch.float32, 16)
    assert distance(load_packed(folder, backend="dequantize"), dense) <= 1e-5
    with pytest.raises(trimoe.UserError, match="groups of 16 on cpu; these can: dequantize, int8-dynamic"):
        load_packed(folder, backend="int4-weight-only")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_auto_takes_multiplies_by_the_stored_weights(bits: int, tokens: int) -> None:
    """Several groups with very different scales a row; inputs that bfloat16 holds, so that nothing is rounded but sums."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(64, 128, generator=generator) * torch.tensor([1.0, 0.01, 10.0, 0.1]).repeat_interleave(32)
    packed = quantize(w_OI, bits, 32, torch.bfloat16)
    x_TI = torch.randn(tokens, 128, generator=generator).bfloat16() / torch.tensor([1.0, 0.01, 10.0, 0.1]).repeat_interleave(32).bfloat16()
    expected = x_TI.double() @ packed.dense(torch.float64).T
    error = {name: _far(choose(name, bits, 32, (64, 128), CPU), packed, x_TI.float(), expected) for name in ("auto", "int8-dynamic")}
    assert error["auto"] <= 0.006 < 0.02 < error["int8-dynamic"]  # regrouped, small scales vanish beside large ones


def _far(backend: Any, packed: Packed, x_TI: torch.Tensor, expected: torch.Tensor) -> float:
    return float((backend.linear(x_TI, backend.pack(packed)).double() - expected).norm() / expected.norm())


def test_gradients_need_the_exact_backend(made: Any) -> None:
    folder, _ = made("mixtral")
    model = load_packed(folder, backend="dequantize")
    model.get_input_embeddings().requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    fast = load_packed(folder)
    fast.get_input_embeddings().requires_grad_(True)
    with pytest.raises(trimoe.UserError, match="backend='dequantize'"):
        fast(IDS, labels=IDS)


def test_mistakes_are_named(made: Any, tmp_path: Path) -> None:
    folder, _ = made("mixtral")
    names = ", ".join(dict.fromkeys(backend.name for backend in BACKENDS))
    with pytest.raises(trimoe.UserError, match=f"There is no backend 'fast'; there are: auto, {names}."):
        trimoe.load(folder, backend="fast")
    with pytest.raises(trimoe.UserError, match="not quantised"):
        trimoe.load(folder.parent / "packed-dense", backend="int8-dynamic")
    with pytest.raises(trimoe.UserError, match="dtype 'floaty' is not one of auto, float32"):
        trimoe.load(folder, dtype="floaty")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    tensors = load_file(folder / "model.safetensors")
    key = next(iter(Checkpoint.open(folder).tensors.keys() - Checkpoint.open(folder).stored.keys())).removesuffix("weight")
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[key + part]
    tensors[key + "weight"] = load_file(folder.parent / "packed-dense" / "model.safetensors")[key + "weight"]
    save_file(tensors, mixed / "model.safetensors")
    (mixed / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(trimoe.UserError, match="is not packed as the other experts are"):
        trimoe.load(mixed)


@pytest.mark.slow
def test_bench(made: Any) -> None:
    folder, _ = made("mixtral")
    report = bench.bench(folder, folder.parent / "packed-dense", prompt=8, generate=4, rounds=2)
    first, second = report["models"]
    assert first["backends"] == {"int4-weight-only": 48} and second["backends"] is None
    assert first["disk_bytes"] < second["disk_bytes"]
    for model in (first, second):
        assert all(len(values) == 2 and min(values) > 0 for values in model["rounds"].values())
        assert model["peak_bytes"] >= model["resident_bytes"] > 0 and model["load_s"] > 0
    assert json.loads(json.dumps(report)) == copy.deepcopy(report)
    assert report["ratio"]["decode_tokens_s"]["median"] > 0
    with pytest.raises(trimoe.UserError, match="context"):
        bench.bench(folder, prompt=60, generate=60, rounds=1)
