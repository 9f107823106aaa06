"""What decoder layers hand each other beside hidden states: carried along, or refused before any work."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from torch import nn

import trimoe
from trimoe.model import layer_call
from trimoe.model.skeleton import Skeleton
from trimoe.walk import hidden_states as spill
from trimoe.walk.decided import masked
from trimoe.walk.walk import LayerWalk

IDS = torch.randint(3, 90, (5, 16), generator=torch.Generator().manual_seed(1))
INDEXED: dict[str, Any] = {
    **families.SMALL, **families.GROUPED, **families.MLA, "q_lora_rank": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 8, "mlp_layer_types": ["dense", "sparse", "sparse"],
    "indexer_types": ["full", "full", "shared"],
}  # fmt: skip


def save(family: str, folder: Path, **fields: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "more"), [("glm_moe_dsa", {}), ("hy_v4", {"hc_mult": 2})])
@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 4]])
def test_the_choice_of_an_indexer_is_carried_on(
    family: str, more: dict[str, Any], sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family not in passing_families():
        pytest.skip("not in this version of transformers")
    folder = save(family, tmp_path / "model", **INDEXED, **more)
    monkeypatch.setattr(spill, "BUDGET", 0 if sizes == [1, 4] else spill.BUDGET)
    skeleton = Skeleton.of(str(folder))
    assert skeleton.passed_on == 1
    walk = LayerWalk(skeleton, list(IDS.split(sizes)))
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            walk.advance(index, layer)
    with walk.head() as head, torch.no_grad():
        walked = torch.cat([head(hidden, batch) for batch, hidden in enumerate(walk.hidden)])
        truth = trimoe.load(folder, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(walked, truth, atol=2e-5, rtol=1e-4)


def passing_families() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_every_walk_of_a_recipe_carries_it(tmp_path: Path, text_file: Path) -> None:
    folder = save("glm_moe_dsa", tmp_path / "model", **INDEXED)
    steps = [{"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy", "receptive_field": {"k": 2, "t": 2}}}]
    made = trimoe.compress(folder, {"steps": steps}, tmp_path / "out", calibration=[str(text_file)], samples=4, length=32)
    model, skeleton = trimoe.load(folder, dtype=torch.float32), Skeleton.of(str(folder))
    layers: Any = model.get_submodule(skeleton.prefix)
    with torch.no_grad(), ExitStack() as stack:
        for index, decision in made.decisions.items():
            gone = tuple(sorted(set(range(8)) - set(decision.keep)))
            stack.enter_context(masked(layers[index], skeleton.sites[index], gone))
        torch.testing.assert_close(trimoe.load(made.out, dtype=torch.float32)(IDS).logits, model(IDS).logits, atol=2e-5, rtol=1e-4)
    report = trimoe.evaluate(made.out, against=folder, text=[str(text_file)], length=32, tokens=64)
    assert 0 < report["mean_kl"] < 10


class Layer(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a stand is run instead")


class Model(nn.Module):
    """Runs three layers in one of the ways that models have."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.layers = way, nn.ModuleList(Layer() for _ in range(3))
        self.table, self.head = nn.Embedding(9, 8, device="meta"), nn.Linear(8, 9, device="meta")

    def get_input_embeddings(self) -> Any:
        return self.table

    def set_input_embeddings(self, new: Any) -> None:
        self.table = new

    def get_output_embeddings(self) -> Any:
        return self.head

    def set_output_embeddings(self, new: Any) -> None:
        self.head = new

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        first = x = self.table(input_ids)
        shared, rest, seen = {}, None, []
        for layer in self.layers:
            if self.way == "pair":
                x, rest = layer(x, rest)
            elif self.way == "triple":
                x, rest, other = layer(x, rest=rest)
                rest = (rest, other)[0]
            elif self.way == "shared":
                x = layer(x, shared)
            elif self.way == "sum":
                seen.append(x)
                x = layer(x, sum(seen))
            elif self.way == "changed":
                x = layer(x) * 2
            else:
                x = layer(x, first, mask=torch.ones(4))
        return SimpleNamespace(logits=self.head(x + first if self.way == "end" else x))


@pytest.mark.parametrize(("way", "beside"), [("plain", 0), ("pair", 1), ("triple", 2)])
def test_what_goes_from_layer_to_layer_is_counted(way: str, beside: int) -> None:
    model = Model(way)
    table, head = model.table, model.head
    assert layer_call.passed_on(model, model.layers) == beside  # type: ignore[arg-type]
    assert (model.table, model.head) == (table, head) and all(isinstance(layer, Layer) for layer in model.layers)


@pytest.mark.parametrize(("way", "message"), [
    ("shared", "layer 1 is given what earlier layers computed"), ("sum", "layer 1 is given what earlier layers computed"),
    ("changed", "more than hidden states"), ("end", "its head is given more"),
])  # fmt: skip
def test_other_ways_are_refused(way: str, message: str) -> None:
    model = Model(way)
    with pytest.raises(trimoe.UserError, match=message):
        layer_call.passed_on(model, model.layers)  # type: ignore[arg-type]


def test_inspect_says_so(tmp_path: Path) -> None:
    if "inkling2_text" not in passing_families():
        pytest.skip("not in this version of transformers")
    folder = save("inkling2_text", tmp_path / "model", **{**families.SMALL, **families.GROUPED, "head_dim": 8})
    about = trimoe.inspect(str(folder))
    assert not about["supported"] and "hidden states; not supported yet" in about["reason"]
