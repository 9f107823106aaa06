"""Loading finished folders: `AutoModelForCausalLM.from_pretrained(DIR)` needs no flag after `import trimoe`; and `trimoe.load`."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimoe import hf, modeling_trimoe
from trimoe.checkpoint import Checkpoint
from trimoe.errors import UserError

# The families whose native checkpoints the Auto classes open without a flag, registered by listing. (trimoe.load opens every family.)
FAMILIES = (
    "afmoe", "axk1", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open",
)  # fmt: skip


class NativeLoader:
    """Stands in the Auto mapping for a family's class: the stock class for stock checkpoints, the reshaped one for native ones."""

    @classmethod
    def _class_for(cls, config: Any) -> type[PreTrainedModel]:
        stock = modeling_trimoe.stock_class(config)
        return modeling_trimoe.native_class(stock) if getattr(config, modeling_trimoe.KEY, None) else stock

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any, **kwargs: Any) -> PreTrainedModel:
        return cls._class_for(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        return cls._class_for(config)._from_config(config, **kwargs)


def register() -> None:
    """Let `AutoModelForCausalLM` open native checkpoints. Called by `import trimoe`; calling it again changes nothing."""
    for family in FAMILIES:
        if family in CONFIG_MAPPING:  # not every transformers version has them all
            AutoModelForCausalLM.register(CONFIG_MAPPING[family], NativeLoader, exist_ok=True)


def load(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto", **options: Any
) -> PreTrainedModel:
    """A finished folder (or any causal MoE model, built-in ones too) as a transformers model in eval mode.

    `dtype` "auto" keeps the checkpoint's. `options` go to `from_pretrained`. Raises UserError where the folder is not a model.
    """
    checkpoint = Checkpoint.open(folder)
    config = hf.load_config(checkpoint.folder)
    if hf.causal_lm_class(config) is None:
        raise UserError(f"{folder} ({config.model_type}) is not a causal language model that transformers knows.")
    model = NativeLoader.from_pretrained(checkpoint.folder, config=config, dtype=dtype, **options)
    return model.to(torch.device(device)).eval()  # type: ignore[arg-type]
