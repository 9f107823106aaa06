"""Random qwen3_moe-like checkpoints for the other scripts, written shard by shard, so that making one costs no memory. They have the
shapes of a real model and nothing of its quality."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig


def config_of(*, layers: int, experts: int, hidden: int, width: int, top_k: int, vocabulary: int, context: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        num_hidden_layers=layers, num_experts=experts, hidden_size=hidden, moe_intermediate_size=width, num_experts_per_tok=top_k,
        vocab_size=vocabulary, max_position_embeddings=context, num_attention_heads=8, num_key_value_heads=4, head_dim=hidden // 8,
        intermediate_size=width, norm_topk_prob=True, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        architectures=["Qwen3MoeForCausalLM"], dtype="float32",
    )  # fmt: skip


def save(config: Qwen3MoeConfig, folder: Path, seed: int = 0) -> None:
    """One shard for what is outside the layers, one for each layer, float32; matrices ~ N(0, 1 / columns), norms 1."""
    generator = torch.Generator().manual_seed(seed)
    names, total = {}, 0
    for number, group in enumerate([_outer(config), *(_layer(config, index) for index in range(config.num_hidden_layers))]):
        tensors = {
            key: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator).div_(shape[-1] ** 0.5)
            for key, shape in group
        }
        file = f"model-{number + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _outer(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    table = (config.vocab_size, config.hidden_size)
    yield from (("model.embed_tokens.weight", table), ("model.norm.weight", table[1:]), ("lm_head.weight", table))


def _layer(config: Qwen3MoeConfig, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    at, hidden, width = f"model.layers.{index}.", config.hidden_size, config.moe_intermediate_size
    heads, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield from ((at + f"{norm}.weight", (hidden,)) for norm in ("input_layernorm", "post_attention_layernorm"))
    yield from ((at + f"self_attn.{norm}.weight", (config.head_dim,)) for norm in ("q_norm", "k_norm"))
    for name, rows in (("q_proj", heads), ("k_proj", shared), ("v_proj", shared)):
        yield at + f"self_attn.{name}.weight", (rows, hidden)
    yield at + "self_attn.o_proj.weight", (hidden, heads)
    yield at + "mlp.gate.weight", (config.num_experts, hidden)
    for expert in range(config.num_experts):
        for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
            yield at + f"mlp.experts.{expert}.{name}.weight", shape


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
