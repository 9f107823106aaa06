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


def test_scripts_that_import_it_get_everything() -> None:
    script = "import sys, trimoe; sys.argv[0]; assert callable(trimoe.compress) and 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", script, "--help"], check=True)
