"""Random qwen3_moe and qwen2_moe checkpoints for the other scripts, written shard by shard, so that making one costs no memory. They have
the shapes of a real model and nothing of its quality."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

BLOCK = 1 << 24  # random numbers that are drawn; larger tensors repeat them


def config_of(
    *, layers: int, experts: int, hidden: int, width: int, top_k: int, vocabulary: int, context: int, dtype: str = "float32"
) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        num_hidden_layers=layers, num_experts=experts, hidden_size=hidden, moe_intermediate_size=width, num_experts_per_tok=top_k,
        vocab_size=vocabulary, max_position_embeddings=context, num_attention_heads=8, num_key_value_heads=4, head_dim=hidden // 8,
        intermediate_size=width, norm_topk_prob=True, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["Qwen3MoeForCausalLM"], dtype=dtype,
    )  # fmt: skip


def qwen15_moe(layers: int = 24) -> Qwen2MoeConfig:
    """The shape of Qwen1.5-MoE-A2.7B: 14.3 billion parameters with its 24 layers, in bfloat16."""
    return Qwen2MoeConfig(
        num_hidden_layers=layers, num_experts=60, hidden_size=2048, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        num_experts_per_tok=4, vocab_size=151936, max_position_embeddings=8192, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=5632, norm_topk_prob=False, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["Qwen2MoeForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def save(config: PreTrainedConfig, folder: Path, seed: int = 0) -> None:
    """One shard for what is outside the layers, one for each layer, in the configuration's dtype; matrices ~ N(0, 1 / columns), norms 1."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(BLOCK, generator=generator)
    names, total = {}, 0
    for number, group in enumerate([_outer(config), *(_layer(config, index) for index in range(config.num_hidden_layers))]):
        tensors = {key: _random(shape, block, generator).to(config.dtype) for key, shape in group}
        file = f"model-{number + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _random(shape: tuple[int, ...], block: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    count = math.prod(shape)
    start = int(torch.randint(max(1, BLOCK - count), (1,), generator=generator))
    long = block[start:] if count < BLOCK else block.repeat(-(-count // BLOCK))
    return long[:count].view(shape) / shape[-1] ** 0.5


def _outer(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    table = (config.vocab_size, config.hidden_size)
    yield from (("model.embed_tokens.weight", table), ("model.norm.weight", table[1:]), ("lm_head.weight", table))


def _layer(config: Any, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    at, hidden, width = f"model.layers.{index}.", config.hidden_size, config.moe_intermediate_size
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads, shared, normed = config.num_attention_heads * size, config.num_key_value_heads * size, config.model_type == "qwen3_moe"
    yield from ((at + f"{norm}.weight", (hidden,)) for norm in ("input_layernorm", "post_attention_layernorm"))
    yield from ((at + f"self_attn.{norm}.weight", (size,)) for norm in ("q_norm", "k_norm") if normed)
    for name, rows in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
        yield at + f"self_attn.{name}.weight", (rows, hidden)
        if not normed:
            yield at + f"self_attn.{name}.bias", (rows,)
    yield at + "self_attn.o_proj.weight", (hidden, heads)
    yield at + "mlp.gate.weight", (config.num_experts, hidden)
    blocks = [(f"experts.{expert}", width) for expert in range(config.num_experts)]
    if not normed:
        yield at + "mlp.shared_expert_gate.weight", (1, hidden)
        blocks.append(("shared_expert", config.shared_expert_intermediate_size))
    for block, inner in blocks:
        for name, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
            yield at + f"mlp.{block}.{name}.weight", shape


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable ASCII character; 0 pads, 1 begins, 2 ends."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(code): code - 29 for code in range(32, 125)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def batches(tokens: int, length: int, vocabulary: int, seed: int = 0, batch_tokens: int = 4096) -> list[torch.Tensor]:
    """Random token ids in batches as calibration makes them."""
    ids = torch.randint(3, vocabulary, (tokens // length, length), generator=torch.Generator().manual_seed(seed))
    return list(ids.split(max(1, batch_tokens // length)))
