"""Tiny random models of every supported family, built on the spot: they prove plumbing, never quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SMALL: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
MLA: dict[str, Any] = dict(kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
QWEN: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=40)
GROUPED: dict[str, Any] = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=40)

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=24, sliding_window=None),
    "qwen2_moe": dict(**QWEN, shared_expert_intermediate_size=24, norm_topk_prob=False),
    "qwen3_moe": dict(**QWEN, head_dim=8, norm_topk_prob=True),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2, intermediate_size=24, num_key_value_heads=4),
    "deepseek_v2": dict(**GROUPED, **MLA, q_lora_rank=None, n_shared_experts=1, first_k_dense_replace=1,
                        topk_method="group_limited_greedy", n_group=2, topk_group=1, routed_scaling_factor=1.5),
    "deepseek_v3": dict(**GROUPED, **MLA, q_lora_rank=None, n_shared_experts=1, first_k_dense_replace=1,
                        n_group=2, topk_group=1, routed_scaling_factor=2.5),
    "glm4_moe": dict(**GROUPED, head_dim=8, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=24, head_dim=8),
    "phimoe": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=24),
    "granitemoe": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=24, residual_multiplier=0.5),
    "ernie4_5_moe": dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=24, intermediate_size=40, moe_num_shared_experts=1,
                         moe_layer_start_index=1, moe_layer_end_index=2, moe_layer_interval=1),
    "qwen3_next": dict(**QWEN, shared_expert_intermediate_size=24, head_dim=8, linear_num_key_heads=2,
                       linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
                       layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "minimax": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=24, head_dim=8, block_size=16,
                    layer_types=["linear_attention", "full_attention", "linear_attention"]),
    "jamba": dict(num_experts=8, num_experts_per_tok=2, intermediate_size=24, attn_layer_period=2, attn_layer_offset=1,
                  expert_layer_period=2, expert_layer_offset=0, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    "hunyuan_v1_moe": dict(num_experts=8, moe_topk=2, intermediate_size=24, head_dim=8),
}  # fmt: skip


def config_of(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    return AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> transformers.PreTrainedModel:
    """A tiny model whose routers disagree: every parameter is random, biases and norms included; of buffers those that are learnt (biases of
    routers) alone, for others hold what a model is defined by, such as minimax's decays, which make it causal."""
    config = config_of(family, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in model.state_dict().items():
            if name in buffers and not name.endswith("bias"):
                continue
            if "norm" in name:
                tensor.normal_(1.0, 0.1)
            elif name.endswith(("bias", "A_log", ".D")):
                tensor.normal_(0.0, 0.1)
            elif tensor.dim() >= 2:
                tensor.normal_(0.0, 1.0 / tensor.shape[-1] ** 0.5)
    return model.to(dtype)


def save(family: str, folder: Path, *, shard: str = "40KB", **options: Any) -> transformers.PreTrainedModel:
    model = build(family, **options)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return model


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable ASCII character; 0 pads, 1 begins, 2 ends."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(code): code - 29 for code in range(32, 125)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
