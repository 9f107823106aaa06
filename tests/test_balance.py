"""The load-balancing loss of results whose layers differ in their numbers of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import trimoe
from trimoe.modeling_trimoe import balanced

IDS = torch.arange(3, 35).view(2, 16)


def reference(logits_TE: torch.Tensor, top_k: int, counted_T: torch.Tensor) -> float:
    """E sum over experts of (share of the tokens' choices) (mean probability): Switch Transformer, equations 4 to 6."""
    total, count = 0.0, logits_TE.shape[1]
    tokens = [row for row, counts in zip(logits_TE, counted_T.flatten(), strict=True) if counts]
    for expert in range(count):
        chosen = sum(expert in row.topk(top_k)[1].tolist() for row in tokens)
        probability = sum(float(row.softmax(0)[expert]) for row in tokens)
        total += count * (chosen / len(tokens)) * (probability / len(tokens))
    return total


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_mean_of_the_layers(
    family: str, masked: bool, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    steps = [{"expert_drop": {"ratio": 0.3, "counts": "global"}}]
    made = trimoe.compress(family_folder(family), {"steps": steps}, tmp_path / "out", calibration=[str(text_file)], samples=4, length=32)
    counts = [len(decision.keep) for decision in made.decisions.values()]
    assert len(set(counts)) > 1
    model = AutoModelForCausalLM.from_pretrained(made.out, dtype=torch.float32)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 1 - int(masked)
    out = model(IDS, labels=IDS, output_router_logits=True, attention_mask=mask if masked else None)
    layers = [reference(logits.detach().reshape(-1, logits.shape[-1]), 2, mask) for logits in out.router_logits]
    assert [logits.shape[-1] for logits in out.router_logits] == counts
    assert float(out.aux_loss) == pytest.approx(sum(layers) / len(layers), rel=1e-4)
    plain = model(IDS, labels=IDS, attention_mask=mask if masked else None)
    aux = model.config.router_aux_loss_coef * out.aux_loss
    assert float(out.loss) == pytest.approx(float(plain.loss + aux), rel=1e-5)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_equal_layers_have_the_stock_loss() -> None:
    calls = []
    loss = balanced(lambda *args: calls.append(args) or torch.zeros(()))  # type: ignore[func-returns-value]
    equal = (torch.zeros(4, 8), torch.zeros(4, 8))
    loss(equal, 8, 2, None)
    loss(None, 8, 2)
    assert calls == [(equal, 8, 2, None), (None, 8, 2)]
