"""Tiny models and texts, built once per test session."""

from __future__ import annotations

import os
import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: threads of one would wait for those of the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["TRIMOE_CACHE"] = tempfile.mkdtemp(prefix="trimoe-cache-")  # no test sees results of another run

import families
import pytest


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A saved tiny model of a family; the same folder every time it is asked for. Tests must not write into it."""
    built: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in built:
            folder = tmp_path_factory.mktemp(family)
            families.save(family, folder)
            built[family] = folder
        return built[family]

    return get


@pytest.fixture(scope="session")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of as many layers as an eighth of them needs. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("eight")
    families.save("mixtral", folder, num_hidden_layers=8)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters: enough for a few dozen samples of 32 tokens."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(generator.choice(string.ascii_lowercase + "    ,.") for _ in range(4000)), encoding="utf-8")
    return path
