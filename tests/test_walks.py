"""Measurements that walk the model, against the same measured in memory: receptive field, sensitivity, evaluation."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import trimoe
from trimoe import cli
from trimoe.evaluate.texts import windows
from trimoe.methods.expert_drop import receptive_field
from trimoe.methods.expert_drop.options import ReceptiveField
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET
from trimoe.text.samples import load_tokenizer
from trimoe.walk import hidden_states
from trimoe.walk import walk as stream
from trimoe.walk.decided import masked
from trimoe.walk.hidden_states import SAMPLES, STREAMS
from trimoe.walk.sensitivity import LEAST, Sensitivity, nudged, probe_size, sensitivity, shrunk
from trimoe.walk.versions import divergence, probe_rows, spread, without_moe
from trimoe.walk.walk import LayerWalk

WALKED = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]
BATCHES = [torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(n)) for n in range(2)]
SETS = [(0, 4), (1, 5), (2, 6)]  # one from each half: allowed with two router groups as well


def outputs(layers: nn.ModuleList, model: nn.Module, index: int) -> torch.Tensor:
    """What decoder layer `index` gives for all batches."""
    seen: list[torch.Tensor] = []
    handle = layers[index].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    handle.remove()
    return torch.cat([part.flatten() for part in seen])


@pytest.mark.parametrize("family", WALKED)
@pytest.mark.parametrize("mode", ["progressive", "layerwise"])
def test_receptive_field_finds_the_best_combination(family: str, mode: str, family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder(family)))
    model = families.build(family)
    layers: Sequence[nn.Module] = model.get_submodule(skeleton.prefix)  # type: ignore[assignment]
    moe = list(skeleton.sites)
    field = ReceptiveField(k=3, t=2, mode=mode)
    chosen = receptive_field.choose(skeleton, BATCHES, dict.fromkeys(moe, SETS), field)
    blocks = [moe[start : start + 2] for start in range(0, len(moe), 2)]
    assert [block["layers"] for block in chosen.blocks] == blocks
    before: dict[int, tuple[int, ...]] = {}
    for block, said in zip(blocks, chosen.blocks, strict=True):
        truth = outputs(layers, model, block[-1])  # type: ignore[arg-type]
        error = {}
        for places in product(range(3), repeat=len(block)):
            drops = {**before, **dict(zip(block, (SETS[p] for p in places), strict=True))}
            with ExitStack() as stack:
                for index, drop in drops.items():
                    stack.enter_context(masked(layers[index], skeleton.sites[index], drop))
                found = outputs(layers, model, block[-1])  # type: ignore[arg-type]
            error[places] = float((found - truth).norm() / truth.norm())
        best = min(error, key=error.__getitem__)
        assert said["error"] == pytest.approx(error[best], rel=1e-4)
        assert said["error_of_first"] == pytest.approx(error[(0,) * len(block)], rel=1e-4)
        assert error[tuple(said["places"])] == pytest.approx(error[best], rel=1e-4)  # type: ignore[arg-type]
        assert [chosen.drops[i] for i in block] == [SETS[p] for p in said["places"]]  # type: ignore[attr-defined]
        if mode == "progressive":
            before |= {i: chosen.drops[i] for i in block}


@pytest.mark.parametrize("family", WALKED)
def test_sensitivity_equals_perturbing_in_memory(family: str, family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder(family)))
    model = families.build(family)
    layers: Sequence[nn.Module] = model.get_submodule(skeleton.prefix)  # type: ignore[assignment]
    first, *others = skeleton.sites
    perturb = {first: lambda layer, site: masked(layer, site, SETS[0]), **dict.fromkeys(others, shrunk)}
    measured = sensitivity(skeleton, BATCHES, perturb)

    @torch.no_grad()
    def log_p() -> torch.Tensor:
        return torch.cat([model(batch).logits.double().log_softmax(-1).flatten(0, 1) for batch in BATCHES])

    truth = log_p()
    for index in skeleton.sites:
        site, layer = skeleton.sites[index], layers[index]
        with perturb[index](layer, site):
            wrong = log_p()
        kl = float((truth.exp() * (truth - wrong)).sum(-1).mean())
        assert measured.kl[index] == pytest.approx(kl, rel=2e-3, abs=1e-7)
        if index != first:
            assert measured.loss[index] == pytest.approx(0.3, rel=1e-4), "shrunk takes exactly its share"
    assert set(measured.weights()) == set(skeleton.sites)
    assert all(value > 0 for value in measured.weights().values())


def test_samples_of_a_probe_keep_to_their_room_and_are_of_every_domain(family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder("mixtral")))
    samples, domains = torch.zeros(50, 4096, dtype=torch.int64), ["english", "docs", "code"] * 16 + ["docs"] * 2
    for streams in (3, 30, 3000, 30_000):
        rows = probe_rows(skeleton, samples, streams, domains)
        assert 4 * 32 * 4096 * len(rows) * (streams + 2) <= STREAMS or len(rows) == 3
        each = Counter(domains[row] for row in rows)
        assert len(set(rows)) == len(rows) <= SAMPLES and set(each) == set(domains) and max(each.values()) - min(each.values()) <= 1
    assert len(probe_rows(skeleton, samples, 3, domains)) == SAMPLES
    assert probe_rows(skeleton, samples[:5], 3) == [0, 1, 2, 3, 4]


def test_spread_takes_all_of_a_short_domain() -> None:
    assert spread(["a", "b", "b", "b", "b", "b"], 4) == [0, 1, 3, 5]
    assert spread(["a", "b"], 1) == [0]


def test_what_rounding_alone_makes_is_measured_and_taken_away(family_folder: Callable[[str], Path]) -> None:
    folder = str(family_folder("mixtral"))
    measured = [
        sensitivity(skeleton, BATCHES, dict.fromkeys(skeleton.sites, shrunk))
        for skeleton in (Skeleton.of(folder), Skeleton.of(folder, torch.bfloat16))
    ]
    assert set(measured[0].floor.values()) == {0.0}
    assert all(value >= 0 for value in measured[1].floor.values()) and max(measured[1].floor.values()) > 0
    found = Sensitivity(kl={0: 0.5, 1: 0.02, 2: 0.1}, loss={0: 0.5, 1: 0.1, 2: 0.0}, floor={0: 0.25, 1: 0.02, 2: 0.0})
    weights = found.weights()
    assert weights[0] == pytest.approx(1.0) and weights[1] == pytest.approx(0.5), "a quarter of a KL stays whatever the floor"
    assert weights[2] == pytest.approx(0.75), "a layer that was not perturbed has the mean"


def test_a_nudge_is_a_rounding(family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder("mixtral")), torch.bfloat16)
    walk = LayerWalk(skeleton, BATCHES)
    outputs: list[torch.Tensor] = []
    index, site = next(iter(skeleton.sites.items()))
    with walk.layer(index) as layer:
        for change in (nullcontext(), nudged(layer, site)):
            with change:
                handle = site.experts_of(layer).register_forward_hook(lambda module, args, output: outputs.append(output.float()))
                walk.step(index, layer, walk.hidden[0], 0)
                handle.remove()
    off = (outputs[1] - outputs[0]).abs() / outputs[0].abs().clamp_min(1e-30)
    assert 0 < float(off.max()) <= torch.finfo(torch.bfloat16).eps
    assert 0.1 < float((off > 0).float().mean()) <= 0.25


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_logits_that_are_compared_are_float32(family: str, family_folder: Callable[[str], Path]) -> None:
    walk = LayerWalk(Skeleton.of(str(family_folder(family)), torch.bfloat16), BATCHES)
    walk.run("", QUIET)
    seen: list[torch.Tensor] = []
    with walk.head() as head:
        module = walk.model.get_output_embeddings()
        handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        exact = head(walk.hidden[0], 0)
        handle.remove()
        truth = seen[-1].double() @ module.weight.double().T
        rounded = seen[-1] @ module.weight.T
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    torch.testing.assert_close(exact.double(), truth, rtol=1e-5, atol=1e-5)
    assert not torch.equal(exact, rounded.float())


def test_a_probe_takes_more_until_its_error_is_seen() -> None:
    losses = {0: 0.0, 2: 1e-6, 4: LEAST / 2, 6: LEAST, 8: 0.5}
    assert [probe_size(losses, wanted) for wanted in (1, 2, 6, 7, 8, 9)] == [6, 6, 6, 8, 8, 8]
    assert probe_size({0: 0.0, 2: 1e-6, 4: LEAST / 2}, 2) == 0
    assert probe_size({0: 0.0}, 2) == 0


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), length=st.integers(2, 12), data=st.data())
def test_windows_score_every_token_once(lengths: list[int], length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    documents = [torch.arange(n) + 100 * number for number, n in enumerate(lengths)]
    if max(lengths) < 2:
        with pytest.raises(trimoe.UserError, match="no document of at least 2 tokens"):
            windows("text", documents, length, stride, 10**9)
        return
    made = windows("text", documents, length, stride, 10**9)
    scored = []
    for ids, mask, owner in zip(made.ids_NL, made.scored_NL, made.document_N, strict=True):
        places = mask.nonzero()[:, 0].tolist()
        assert places, "a window that scores nothing"
        assert max(places) < length - 1
        scored += [int(ids[place + 1]) for place in places]
        first = int(ids[0]) - 100 * int(owner)
        if first:  # not a document's first window: what it scores has at least length - stride tokens before it
            assert min(places) + 1 >= min(length - stride, length - 1)
    assert sorted(scored) == sorted(int(token) for document in documents for token in document[1:])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_evaluate_equals_the_model_itself(family: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    folder = family_folder(family)
    trimoe.compress(folder, {"steps": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "frequency"}}]}, tmp_path / "out",
                    calibration=[str(text_file)], samples=4, length=32)  # fmt: skip
    report = trimoe.evaluate(tmp_path / "out", against=str(folder), text=[str(text_file)], length=32, stride=16, tokens=500)
    (row,) = report["texts"]
    ids = torch.tensor(load_tokenizer(Skeleton.of(str(folder)).checkpoint).encode(text_file.read_text()))
    student, teacher = trimoe.load(tmp_path / "out"), trimoe.load(str(folder))
    entry = windows("letters", [ids], 32, 16, 500)
    with torch.no_grad():
        log_q, log_p = (model(entry.ids_NL).logits.double().log_softmax(-1) for model in (student, teacher))
    mask, target = entry.scored_NL, entry.ids_NL.roll(-1, 1)
    for log, said in ((log_q, row["perplexity"]), (log_p, row["against"]["perplexity"])):
        nll = -log.gather(-1, target.unsqueeze(-1)).squeeze(-1)[mask]
        assert said == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert row["tokens"] == int(mask.sum())
    assert row["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()), rel=1e-3)
    assert row["agreement"] == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1))[mask].double().mean()), abs=2e-3)


def test_eval_compares_with_the_origin_only_while_it_is_the_same(
    family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, elsewhere = tmp_path / "source", tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(family_folder("mixtral"), source)
    monkeypatch.chdir(tmp_path)
    trimoe.compress("source", {"steps": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "frequency"}}]}, out,
                    calibration=[str(text_file)], samples=4, length=32)  # fmt: skip
    monkeypatch.chdir(elsewhere)
    command = ["eval", str(out), "--text", str(text_file), "--length", "32", "--tokens", "100"]
    first = CliRunner().invoke(cli.app, command)
    assert first.exit_code == 0, first.output
    assert "evaluation" in json.loads((out / "trimoe.json").read_text())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    second = CliRunner().invoke(cli.app, command)
    assert second.exit_code == 0
    assert "has changed since" in second.output


@pytest.mark.parametrize("steps", [
    [{"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy", "receptive_field": {"k": 2, "t": 2}}}, {"low_rank": {"ratio": 0.3}}],
    [{"quantize": {"bits": 4, "scope": "all-linear"}}], [{"weight_prune": {"ratio": 0.5}}],
])  # fmt: skip
def test_what_lies_in_files_is_what_would_lie_in_memory(
    steps: list[dict[str, Any]], family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states and recorded inputs beyond the budget: the same bytes come out, and nothing stays in the temporary folder."""
    options: dict[str, Any] = {"calibration": [str(text_file)], "samples": 8, "length": 32}
    trimoe.compress(family_folder("qwen2_moe"), {"steps": steps}, tmp_path / "memory", **options)
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "files"))
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *args, **kwargs: (mapped.append(args), from_file(*args, **kwargs))[1])
    monkeypatch.setattr(hidden_states, "BUDGET", 0)
    monkeypatch.setattr(hidden_states, "FLOOR", 0)
    trimoe.compress(family_folder("qwen2_moe"), {"steps": steps}, tmp_path / "spilled", **options)
    assert mapped and not list((tmp_path / "files").iterdir())
    for path in (tmp_path / "memory").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "spilled" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("device", "gibibytes", "times"),
    [("cpu", 8, 1), ("cpu", 24, 1), ("cpu", 64, 2), ("cpu", 512, 16), ("cuda", 8, 1), ("cuda:0", 24, 4), ("cuda", 80, 16), ("mps", 512, 1)],
)
def test_logits_held_at_once_go_by_memory(device: str, gibibytes: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than a sixteenth of a GPU, a sixty-fourth of the host, beyond what is always held; always a power of two."""
    memory = SimpleNamespace(total=gibibytes << 30, total_memory=gibibytes << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: memory)
    assert hidden_states.wider(device) == times


def test_wider_pieces_give_the_same_divergence(family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton.of(str(family_folder("mixtral")))
    batches = [torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))]
    versions: dict[str, dict[int, Any]] = {"whole": {}, "less": {1: without_moe}}
    found = []
    monkeypatch.setattr(stream, "LOGITS", 96 * 2 * 3)  # three positions
    for times, pieces in ((1, 6), (2, 3), (4, 2)):
        monkeypatch.setattr(stream, "wider", lambda device, times=times: times)
        assert len(LayerWalk(skeleton, batches).pieces(0)) == pieces
        found.append(divergence(skeleton, batches, versions, "whole")["less"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-6) and found[0] > 0
