"""Every statistic against a slow float64 reference, taken from the ordinary in-memory model; merging, files, scores.

Letters: T tokens, E experts, k chosen, H hidden size, I expert width, S the tokens routed to one expert.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import families
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cosine_similarity

from trimoe.calibration.gather import statistics
from trimoe.calibration.search_tokens import choose, shuffled
from trimoe.calibration.statistics import LayerStats, Stats, from_main
from trimoe.errors import UserError
from trimoe.methods.expert_drop import scores
from trimoe.model.moe_block import MoeBlock
from trimoe.model.router import RoutingRule
from trimoe.model.skeleton import Skeleton
from trimoe.team import Team

Value = TypeVar("Value")
ALL = sorted(families.FAMILIES)
EXPERTS = 8
SEARCH_TOKENS, SEED = 40, 5
OF_WEIGHTS = {"weight_score_E"}  # not sums over tokens
NORM_BEFORE_MOE = {"jamba": "pre_ff_layernorm"}
# what the layer does with the residual stream and the block's output
RESIDUAL = {"granitemoe": (1.0, 0.5)}


def token_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 96, shape, generator=generator) for shape in ((2, 16), (2, 16), (1, 12))]


@dataclass
class LayerInputs:
    """What one MoE layer of the in-memory model computed, all tokens in order."""

    module: Any = None
    bias_E: torch.Tensor | None = None
    x: list[torch.Tensor] = field(default_factory=list)
    index: list[torch.Tensor] = field(default_factory=list)
    gate: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    routed: list[torch.Tensor] = field(default_factory=list)  # what stock code makes of the routed experts
    before_norm: list[torch.Tensor] = field(default_factory=list)
    block: list[torch.Tensor] = field(default_factory=list)
    layer_in: list[torch.Tensor] = field(default_factory=list)
    layer_out: list[torch.Tensor] = field(default_factory=list)

    def all(self, name: str) -> torch.Tensor:
        parts = [part.double() if part.is_floating_point() else part for part in getattr(self, name)]
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def watch(layer: nn.Module, site: MoeBlock, norm: str) -> LayerInputs:
    seen = LayerInputs(module=site.experts_of(layer), bias_E=site.bias_of(layer))

    def router(module: nn.Module, args: Any, output: Any) -> None:
        seen.logits.append(output[0])
        seen.gate.append(output[1])
        seen.index.append(output[2])

    def experts(module: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        x, index, gate = (*args, *kwargs.values())[:3]
        seen.x.append(x)
        seen.routed.append(output)
        assert torch.equal(index, seen.index[-1]) and torch.equal(gate, seen.gate[-1])

    def whole(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.layer_in.append(args[0] if args else kwargs["hidden_states"])
        seen.layer_out.append(first(output))

    site.router_of(layer).register_forward_hook(router)
    site.experts_of(layer).register_forward_hook(experts, with_kwargs=True)
    site.block_of(layer).register_forward_hook(lambda module, args, output: seen.block.append(first(output)))
    layer.get_submodule(norm).register_forward_hook(lambda module, args, output: seen.before_norm.append(args[0]))
    layer.register_forward_hook(whole, with_kwargs=True)
    return seen


def in_memory(family: str, skeleton: Skeleton, model: nn.Module) -> dict[int, LayerInputs]:
    layers = model.get_submodule(skeleton.prefix)
    norm = NORM_BEFORE_MOE.get(family, "post_attention_layernorm")
    seen = {index: watch(layers[index], site, norm) for index, site in skeleton.sites.items()}
    with torch.no_grad():
        for batch in token_batches():
            model(batch)
    return seen


@torch.no_grad()
def reference_expert(module: Any, expert: int, x_SH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, y) of one expert in float64, from its weights and layout flags."""
    up, down = (module.gate_up_proj if module.has_gate else module.up_proj)[expert].double(), module.down_proj[expert].double()
    first_SO = torch.einsum("sh,ho->so" if module.is_transposed else "sh,oh->so", x_SH, up)
    if module.has_bias:
        first_SO = first_SO + module.gate_up_proj_bias[expert].double()
    h_SI = module._apply_gate(first_SO)
    y_SH = torch.einsum("si,ih->sh" if module.is_transposed else "si,hi->sh", h_SI, down)
    return h_SI, y_SH + module.down_proj_bias[expert].double() if module.has_bias else y_SH


def reference(seen: LayerInputs) -> dict[str, torch.Tensor]:
    """The definitions of LayerStats, one expert and one pair at a time."""
    x_TH, index_TK, gate_TK = seen.all("x"), seen.all("index"), seen.all("gate")
    tokens, count = len(x_TH), EXPERTS
    want: dict[str, Any] = {"tokens": torch.tensor(float(tokens))}
    outputs_TEH = torch.zeros(tokens, count, x_TH.shape[1], dtype=torch.float64)  # g y, zero where not routed
    here_TE = torch.zeros(tokens, count, dtype=torch.float64)
    for expert in range(count):
        at_TK = index_TK == expert
        here = at_TK.any(1)
        gate_S, x_SH = gate_TK[at_TK], x_TH[here]
        h_SI, y_SH = reference_expert(seen.module, expert, x_SH)
        norm_S = y_SH.square().sum(1).sqrt()
        here_TE[:, expert], outputs_TEH[here, expert] = here.double(), gate_S[:, None] * y_SH
        one = {
            "count_E": here.sum().double(), "gate_sum_E": gate_S.sum(), "norm_sum_E": norm_S.sum(),
            "gate_norm_sum_E": (gate_S * norm_S).sum(), "gate_norm_sq_E": (gate_S * norm_S).square().sum(),
            "max_abs_E": y_SH.abs().max() if len(y_SH) else torch.tensor(0.0).double(),
            "mean_output_EH": y_SH.sum(0), "x_sq_EH": x_SH.square().sum(0), "gx_sq_EH": (gate_S[:, None] * x_SH).square().sum(0),
            "h_sq_EI": h_SI.square().sum(0), "gh_sq_EI": (gate_S[:, None] * h_SI).square().sum(0),
        }  # fmt: skip
        for name, value in one.items():
            want.setdefault(name, []).append(value)
    want = {name: torch.stack(value) if isinstance(value, list) else value for name, value in want.items()}
    want["coactivation_EE"] = here_TE.T @ here_TE
    want["energy_EE"] = torch.einsum("teh,tfh->ef", outputs_TEH, outputs_TEH)
    assert torch.allclose(outputs_TEH.sum(1), seen.all("routed"), rtol=1e-4, atol=1e-5), "the reference is not what stock code computes"
    up, down = (seen.module.gate_up_proj if seen.module.has_gate else seen.module.up_proj), seen.module.down_proj
    weights_EN = torch.cat([up.flatten(1), down.flatten(1)], 1).detach().double()
    want["weight_score_E"] = weights_EN.abs().mean(1) / weights_EN.square().mean(1).sqrt()
    source, out = seen.all("before_norm"), seen.all("layer_out")
    want["sublayer_cosine"] = cosine_similarity(source, out, dim=-1).sum()
    want["output_cosine"] = cosine_similarity(source, seen.all("block"), dim=-1).sum()
    return want


def assert_near(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    atol = 2e-6 * max(1e-12, float(want.abs().max()))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=atol, check_dtype=False, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module")
def gathered(family_folder: Callable[[str], Path]) -> Callable[[str], tuple[Skeleton, Stats]]:
    known: dict[str, tuple[Skeleton, Stats]] = {}

    def get(family: str) -> tuple[Skeleton, Stats]:
        if family not in known:
            skeleton = Skeleton.of(str(family_folder(family)))
            stats = statistics(skeleton, token_batches(), reach=EXPERTS, search_tokens=SEARCH_TOKENS, seed=SEED, about={"model": family})
            known[family] = skeleton, stats
        return known[family]

    return get


Gathered = Callable[[str], tuple[Skeleton, Stats]]


@pytest.mark.parametrize("family", ALL)
def test_every_sum_is_its_definition(family: str, gathered: Gathered) -> None:
    skeleton, stats = gathered(family)
    seen = in_memory(family, skeleton, families.build(family))
    assert list(stats.layers) == list(seen) == list(skeleton.sites) != []
    for index, layer in stats.layers.items():
        want = reference(seen[index])
        assert layer.sums.keys() == want.keys()
        for name, value in want.items():
            assert layer[name].dtype == torch.float64
            assert_near(layer[name], value, f"layer {index}, {name}")
        assert torch.equal(layer["count_E"], want["count_E"]) and torch.equal(layer["coactivation_EE"], want["coactivation_EE"])
        assert float(layer["count_E"].sum()) == 76 * layer.rule.top_k
        total = seen[index].all("routed").square().sum()
        torch.testing.assert_close(layer["energy_EE"].sum(), total, rtol=1e-5, atol=0)
        assert layer.output_norm == pytest.approx(float(total.sqrt()), rel=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_block_cosines_of_every_layer(family: str, gathered: Gathered) -> None:
    """Dense layers included: cos(in, out) from transformers' own hidden states."""
    skeleton, stats = gathered(family)
    model, got = families.build(family), {}
    for index, layer in enumerate(model.get_submodule(skeleton.prefix)):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        layer.register_forward_hook(
            lambda module, args, kwargs, output, seen=seen: seen.append((args[0] if args else kwargs["hidden_states"], first(output))),
            with_kwargs=True,
        )
        got[index] = seen
    with torch.no_grad():
        for batch in token_batches():
            model(batch)
    assert list(stats.blocks) == list(got)
    for index, seen in got.items():
        want = sum(cosine_similarity(a.double(), b.double(), dim=-1).sum() for a, b in seen)
        assert stats.blocks[index].tolist() == pytest.approx([float(want), 76.0], rel=1e-5)


@pytest.mark.parametrize("family", [family for family in ALL if family != "minimax"])
def test_sublayer_cosine_is_of_the_residual_stream(family: str, gathered: Gathered) -> None:
    """cos(x', x' + MoE(Norm(x'))) from its parts; minimax feeds the normed state forward and has no plain residual."""
    skeleton, stats = gathered(family)
    stream, scale = RESIDUAL.get(family, (1.0, 1.0))
    for index, seen in in_memory(family, skeleton, families.build(family)).items():
        source, block = seen.all("before_norm"), seen.all("block")
        want = cosine_similarity(source, stream * source + scale * block, dim=-1).sum()
        torch.testing.assert_close(stats.layers[index]["sublayer_cosine"], want, rtol=1e-5, atol=1e-5)
        assert float(want) / 76 < 0.999, "a cosine of one would prove nothing"


@pytest.mark.parametrize("family", ALL)
def test_search_tokens(family: str, gathered: Gathered) -> None:
    """Logits, order and Gram of the tokens that its routing has chosen for each layer, the Gram from outputs of all experts in float64."""
    skeleton, stats = gathered(family)
    for index, seen in in_memory(family, skeleton, families.build(family)).items():
        rows, weight_T = choose(shuffled(76, SEED), seen.all("index"), EXPERTS, SEARCH_TOKENS)
        layer, x_TH = stats.layers[index], seen.all("x")[rows]
        assert torch.equal(layer.search["weight_T"], weight_T) and float(weight_T.max()) > 1
        assert_near(layer.search["logits_TE"], seen.all("logits")[rows], "logits")
        order_TM = layer.search["order_TM"]
        assert torch.equal(order_TM.sort(1)[0], torch.arange(EXPERTS).expand(SEARCH_TOKENS, -1))
        if layer.rule.ordered:
            scored = layer.rule.scores(layer.search["logits_TE"], seen.bias_E).gather(1, order_TM)
            assert bool((scored.diff(dim=1) <= 0).all())
            chosen = seen.all("index")[rows].sort(1)[0]
            assert torch.equal(order_TM[:, : layer.rule.top_k].sort(1)[0], chosen)
        y_TEH = torch.stack([reference_expert(seen.module, e, x_TH)[1] for e in range(EXPERTS)], 1)
        y_TMH = y_TEH.gather(1, order_TM.unsqueeze(-1).expand(-1, -1, y_TEH.shape[-1]))
        assert_near(layer.search["gram_TMM"], y_TMH @ y_TMH.mT, "Gram")


def test_short_reach_is_a_corner_of_the_whole(family_folder: Callable[[str], Path], gathered: Gathered) -> None:
    skeleton, whole = gathered("qwen2_moe")
    short = statistics(skeleton, token_batches(), reach=5, search_tokens=SEARCH_TOKENS, seed=SEED)
    for index, layer in short.layers.items():
        full = whole.layers[index].search
        assert torch.equal(layer.search["order_TM"], full["order_TM"][:, :5])
        torch.testing.assert_close(layer.search["gram_TMM"], full["gram_TMM"][:, :5, :5], rtol=1e-5, atol=1e-5)
    assert not statistics(skeleton, token_batches(), needs=frozenset()).layers[0].search


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_merging_halves_is_the_whole(family: str, gathered: Gathered) -> None:
    skeleton, _ = gathered(family)
    batches = token_batches()
    options: dict[str, Any] = dict(reach=EXPERTS, search_tokens=1000)
    whole = statistics(skeleton, batches, **options)
    merged, rest = statistics(skeleton, batches[:1], **options), statistics(skeleton, batches[1:], **options)
    merged.merge(rest)
    assert merged.layers.keys() == whole.layers.keys()
    for index, layer in whole.layers.items():
        other = merged.layers[index]
        assert other.sums.keys() == layer.sums.keys()
        for name in ("count_E", "coactivation_EE", "tokens", "max_abs_E"):
            assert torch.equal(other[name], layer[name]), name
        for name in layer.sums.keys() - OF_WEIGHTS:
            value = layer[name]
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-10 * float(value.abs().max()), msg=f"{name} differs")
        for name, tensor in layer.search.items():
            assert torch.equal(other.search[name], tensor), name
            assert len(tensor) == 76


def test_merging_keeps_what_belongs_to_the_weights(gathered: Gathered) -> None:
    skeleton, whole = gathered("mixtral")
    merged, rest = (statistics(skeleton, part) for part in (token_batches()[:1], token_batches()[1:]))
    merged.merge(rest)
    for index, layer in whole.layers.items():
        assert torch.equal(merged.layers[index]["weight_score_E"], layer["weight_score_E"])
        assert torch.equal(scores.weights(merged.layers[index]), layer["weight_score_E"])


def test_merging_takes_in_layers_that_were_not_there() -> None:
    rule = RoutingRule(score="softmax", top_k=1)
    mine, other = Stats({}, {0: LayerStats(0, rule)}), Stats({}, {0: LayerStats(0, rule), 2: LayerStats(2, rule)})
    mine.layers[0].add("tokens", 3)
    other.layers[0].add("tokens", 4)
    other.layers[2].add("max_abs_E", torch.tensor([1.0, 5.0]))
    mine.merge(other)
    assert (float(mine.layers[0]["tokens"]), mine.layers[2]["max_abs_E"].tolist()) == (7.0, [1.0, 5.0])
    mine.layers[2].add("max_abs_E", torch.tensor([2.0, 3.0]))
    assert mine.layers[2]["max_abs_E"].tolist() == [2.0, 5.0]


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "phimoe"])
def test_file_round_trip_is_bitwise(family: str, gathered: Gathered, tmp_path: Path) -> None:
    _, stats = gathered(family)
    stats.save(tmp_path / "sub" / "stats.safetensors")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["stats.safetensors"]
    again = Stats.load(tmp_path / "sub" / "stats.safetensors")
    assert again.about == {"model": family}
    assert again.layers.keys() == stats.layers.keys()
    for index, layer in stats.layers.items():
        other = again.layers[index]
        assert (other.layer, other.rule) == (layer.layer, layer.rule)
        assert (other.bias_E is None) == (layer.bias_E is None)
        assert layer.bias_E is None or torch.equal(other.bias_E, layer.bias_E)
        for mine, theirs in ((layer.sums, other.sums), (layer.search, other.search)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)


def test_wrong_files_are_refused(gathered: Gathered, tmp_path: Path, family_folder: Callable[[str], Path]) -> None:
    path = tmp_path / "stats.safetensors"
    with pytest.raises(UserError, match="is not a statistics file that can be read"):
        Stats.load(path)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(UserError, match="is not a statistics file that can be read"):
        Stats.load(path)
    gathered("mixtral")[1].save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a statistics file that can be read"):
        Stats.load(path)
    with pytest.raises(UserError, match="is not a statistics file of this version"):
        Stats.load(next(family_folder("mixtral").glob("*.safetensors")))
    save_file({"0.count_E": torch.ones(2)}, path, metadata={"format": "trimoe-stats-0"})
    with pytest.raises(UserError, match="format 'trimoe-stats-0'"):
        Stats.load(path)


@pytest.mark.parametrize(("family", "bias"), [("gpt_oss", "router.bias"), ("glm4_moe", "gate.e_score_correction_bias")])
def test_unrouted_experts_are_zero(family: str, bias: str, tmp_path: Path) -> None:
    model = families.build(family)
    with torch.no_grad():
        model.state_dict()[f"model.layers.1.mlp.{bias}"][5] = -100.0
    model.save_pretrained(tmp_path)
    skeleton = Skeleton.of(str(tmp_path))
    stats = statistics(skeleton, token_batches(), reach=EXPERTS)
    layer, want = stats.layers[1], reference(in_memory(family, skeleton, model)[1])
    for name, value in layer.sums.items():
        assert bool(value.isfinite().all()), name
        assert_near(value, want[name], name)
        if name.endswith(("_E", "_EH", "_EI", "_EE")) and name not in OF_WEIGHTS:
            assert bool((value[5] == 0).all()) and bool((value[4] != 0).any()), name
    for name, score in scores.SCORES.items():
        value_E = score(layer)
        assert value_E.shape == (EXPERTS,) and bool(value_E.isfinite().all()), name
    assert scores.reap(layer)[5] == scores.gate(layer)[5] == scores.frequency(layer)[5] == 0
    assert float(scores.leave_one_out(layer)[5]) < 1e-6 < 1e-2 < float(scores.leave_one_out(layer)[4])
    assert scores.coactivation(layer)[5] == 0, "the expert that costs nothing goes first"


class Heard(Team):
    """A process that hears what the main process says; or the main one, which is heard. No more than `room` bytes are said at once."""

    count = 2

    def __init__(self, rank: int, said: list[Any]):
        self.rank, self.said = rank, said

    def from_main(self, work: Callable[[], Value]) -> Value:
        if self.main:
            self.said.append(pickle.dumps(value := work()))
            return value
        heard: Value = pickle.loads(self.said.pop(0))
        return heard

    def fill(self, whole: torch.Tensor, spans: Sequence[slice]) -> None:
        if self.main:
            self.said.append(whole[spans[0]].clone())
        else:
            assert len(whole[spans[1]]) == 0
            whole[spans[0]] = self.said.pop(0)


def test_statistics_of_the_main_process_come_layer_by_layer(gathered: Gathered) -> None:
    whole = gathered("qwen2_moe")[1]
    said: list[Any] = []
    assert from_main(Heard(0, said), lambda: whole) is whole
    layer = next(iter(whole.layers.values()))
    assert sum(isinstance(one, bytes) for one in said) == 1 + len(whole.layers), "a layer at a time"
    assert sum(one.nbytes for one in said if not isinstance(one, bytes)) == len(whole.layers) * sum(
        one.nbytes for one in layer.search.values()
    )
    made = from_main(Heard(1, said), lambda: None)
    assert made is not None and not said and made.about == whole.about and list(made.layers) == list(whole.layers)
    for index, own in whole.layers.items():
        assert torch.equal(made.blocks[index], whole.blocks[index]) and made.layers[index].rule == own.rule
        for mine, theirs in ((made.layers[index].sums, own.sums), (made.layers[index].search, own.search)):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert from_main(Heard(0, said), lambda: None) is None and from_main(Heard(1, said), lambda: None) is None
