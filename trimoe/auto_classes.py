"""`AutoModelForCausalLM.from_pretrained(DIR)` needs no flag after `import trimoe`: native checkpoints are known to the Auto classes."""

from __future__ import annotations

import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = "transformers.models.auto.modeling_auto"
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
        from trimoe import modeling_trimoe

        stock = modeling_trimoe.stock_class(config)
        return modeling_trimoe.native_class(stock) if getattr(config, modeling_trimoe.KEY, None) else stock

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any, **kwargs: Any) -> PreTrainedModel:
        return cls._class_for(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> PreTrainedModel:
        return cls._class_for(config)._from_config(config, **kwargs)


class _Families(dict[type, Any]):
    """What is registered beside the stock classes: configuration class -> model class. transformers' own configurations of FAMILIES are found
    by their model type, so that none of them need be imported to be registered."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or _known(key)

    def __missing__(self, key: type) -> Any:
        if _known(key):
            return NativeLoader
        raise KeyError(key)


def _known(config: object) -> bool:
    stock = str(getattr(config, "__module__", "")).startswith("transformers.models.")
    return stock and getattr(config, "model_type", None) in FAMILIES


def register() -> None:
    """Let `AutoModelForCausalLM` open native checkpoints. `import trimoe` sees to it; calling it again changes nothing."""
    from transformers.models.auto import modeling_auto

    _register(modeling_auto)


def _register(modeling_auto: Any) -> None:
    mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    mapping._extra_content = _Families(mapping._extra_content)


class _Registration(importlib.abc.MetaPathFinder):
    """Registers as soon as the Auto classes are imported, so that `import trimoe` need not wait for transformers."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        spec = next((found for finder in sys.meta_path if finder is not self and (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def registered(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = registered  # type: ignore[method-assign]
        return spec


def register_in_time() -> None:
    """Register now where the Auto classes are loaded, else as soon as they are."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registration())
