"""The shell's completion and the help: what they say, without loading what a press of a key should not wait for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SAY = """
import sys
sys.argv[0] = "/usr/bin/trimoe"
try:
    from trimoe.cli import main
    main()
finally:
    assert not {"torch", "transformers", "numpy"} & set(sys.modules), "a shell waits for these"
"""


def said(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SAY, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert not done.stderr and done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("trimoe com", {"compress"}),
        ("trimoe re", {"recover", "recipes", "report"}),
        ("trimoe compress --rec", {"--recipe"}),
        ("trimoe plan --js", {"--json"}),
    ],
)
def test_words_are_offered(line: str, some: set[str]) -> None:
    found = said(_TRIMOE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split(" ")) - 1))
    assert some <= set(found.split())


def test_help() -> None:
    assert "smaller" in said("--help") and "--recipe" in said("compress", "--help", COLUMNS="100")


@pytest.mark.parametrize("start", [["-m", "trimoe"], ["-m", "trimoe.cli"]])
def test_modules_say_their_help_too(start: list[str]) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", *start, "--help"], capture_output=True, text=True, check=True)
    assert "smaller" in done.stdout and not any(
        line.split("|")[-1].strip() in ("torch", "transformers", "numpy") for line in done.stderr.splitlines()
    )


LAZY = """
import sys, trimoe
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
import trimoe.plan.plan, trimoe.sweep.sweep, trimoe.recover.run, trimoe.evaluate.run, trimoe.compress
assert all(callable(getattr(trimoe, name)) for name in trimoe.__all__ if name != "__version__")
from trimoe import compress, evaluate, plan, recover, sweep
from trimoe.plan import memory
assert plan is trimoe.plan and memory.__name__ == "trimoe.plan.memory"
try:
    trimoe.nothing
except AttributeError as error:
    print(error)
"""


def test_names_are_loaded_when_they_are_used() -> None:
    """Functions keep their names though folders have the same."""
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'trimoe' has no attribute 'nothing'\n"


@pytest.mark.parametrize("first", ["trimoe", "transformers.models.auto.modeling_auto"])
def test_native_checkpoints_are_registered_whatever_is_imported_first(first: str) -> None:
    script = f"""
import {first}
import trimoe
from transformers import MixtralConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
assert MODEL_FOR_CAUSAL_LM_MAPPING[MixtralConfig].__name__ == "NativeLoader"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
