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

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trimoe.garbage import uncollected
from trimoe.version import VERSION as __version__

NAME, *WORDS = getattr(sys, "argv", None) or [""]
COMMAND = os.path.basename(NAME) in ("trimoe", "trimoe.exe", "-m")  # the process is ours


def _words_only() -> bool:
    """Whether `trimoe` was started for its help, or by a shell that completes a line: both want words, and would wait seconds for torch."""
    told = not WORDS or (len(WORDS) <= 2 and WORDS[-1] in ("--help", "--show-completion", "--install-completion"))
    return "_TRIMOE_COMPLETE" in os.environ or (COMMAND and NAME != "-m" and told)


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """While the command's libraries load, Ctrl-C ends the process as it does any other: an import that is interrupted may make another error
    of it, or go on. Nothing has begun yet."""
    ours = COMMAND and threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


WORDS_ONLY = _words_only()

if not WORDS_ONLY:
    with _ended_at_once(), uncollected():
        from trimoe.benchmark import bench
        from trimoe.compress import Result, compress, gather_statistics
        from trimoe.errors import UserError
        from trimoe.evaluate import evaluate
        from trimoe.inspection import inspect
        from trimoe.loading import load, register
        from trimoe.plan import Plan, plan
        from trimoe.recover import Recovered, recover
        from trimoe.sweep import Sweep, sweep

        register()

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
