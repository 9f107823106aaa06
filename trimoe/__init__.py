"""trimoe makes Mixture-of-Experts language models smaller: checkpoint in, checkpoint out.

import trimoe                                   # AutoModelForCausalLM.from_pretrained(DIR) then opens native checkpoints, too
plan = trimoe.plan(model, recipe)               # sizes before and after; str(plan) is the table
result = trimoe.compress(model, recipe, out)    # .decisions .metrics .plan; also DIR/trimoe.json
trimoe.sweep(model, "moe-i2", folder, changes=["steps.0.ratio=[0.1, 0.25]"])  # every variant, evaluated; .rows .best
trimoe.recover(out, trained, {"method": "logits"})  # training to win back quality
model = trimoe.load(out)
trimoe.evaluate(out, against=model)
trimoe.bench(out, against=model)                # speed and memory, in turns
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trimoe.auto_classes import register_in_time
from trimoe.version import VERSION as __version__

if TYPE_CHECKING:
    from trimoe.auto_classes import register
    from trimoe.compress import Result, compress, gather_statistics
    from trimoe.errors import UserError
    from trimoe.evaluate.run import evaluate
    from trimoe.plan.inspection import inspect
    from trimoe.plan.plan import Plan, plan
    from trimoe.recover.run import Recovered, recover
    from trimoe.run.bench import bench
    from trimoe.run.load import load
    from trimoe.sweep.sweep import Sweep, sweep

__all__ = [
    "Plan",
    "Recovered",
    "Result",
    "Sweep",
    "UserError",
    "__version__",
    "bench",
    "compress",
    "evaluate",
    "gather_statistics",
    "inspect",
    "load",
    "plan",
    "recover",
    "register",
    "sweep",
]
MODULES = {
    "Plan": "plan.plan", "Recovered": "recover.run", "Result": "compress", "Sweep": "sweep.sweep", "UserError": "errors",
    "bench": "run.bench", "compress": "compress", "evaluate": "evaluate.run", "gather_statistics": "compress",
    "inspect": "plan.inspection", "load": "run.load", "plan": "plan.plan", "recover": "recover.run", "register": "auto_classes",
    "sweep": "sweep.sweep",
}  # fmt: skip


class _Package(ModuleType):
    """`trimoe.plan` is the function, although a folder of that name is imported, too: Python would put the folder there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import trimoe` waits for nothing."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
    setattr(sys.modules[__name__], name, found)
    return found


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package
register_in_time()
