"""Tiny models and texts, built once per test session."""

from __future__ import annotations

import functools
import os
import random
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: threads of one would wait for those of the others
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["TRIMOE_CACHE"] = tempfile.mkdtemp(prefix="trimoe-cache-")  # no test sees results of another run

import families
import hypothesis
import pytest
from forks import TRANSFORMERS, TRIMOE, Forks
from refusals import Line
from runs import compress_by

import trimoe

# pytest --hypothesis-profile nightly: more examples, and others every night
hypothesis.settings.register_profile("suite", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork share a worker, which imports for all of them. The longest go first: no worker is left alone with one at the end."""
    for item in items:
        if {"with_trimoe", "with_transformers"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.xdist_group("new process"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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


@pytest.fixture(scope="session")
def with_trimoe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """New processes in which trimoe is imported."""
    yield from forks(TRIMOE, tmp_path_factory)


@pytest.fixture(scope="session")
def with_transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """New processes in which transformers is imported and trimoe is not."""
    yield from forks(TRANSFORMERS, tmp_path_factory)


def forks(modules: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    server = Forks(modules, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hub"))})
    yield server
    server.close()


@pytest.fixture(scope="session")
def compressed_by(eight_layers: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], trimoe.Result]:
    """What a whole recipe makes of `eight_layers`; the same folder every time it is asked for. Tests must not change it."""
    folder = tmp_path_factory.mktemp("recipes")
    return functools.cache(lambda recipe: compress_by(recipe, eight_layers, text_file, folder / Path(recipe).stem))


@pytest.fixture(scope="session")
def made(family_folder: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished and evaluated folder of a recipe of pages.RECIPES; the same every time it is asked for. Tests must not change it."""
    from pages import RECIPES, SMALL

    from trimoe.output import card
    from trimoe.output.record import Record

    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            out, source = tmp_path_factory.mktemp("report") / name, family_folder("mixtral")
            trimoe.compress(source, name, out, changes=RECIPES[name][0], calibration=[str(text_file)], **SMALL)
            report = trimoe.evaluate(out, against=source, text=[f"letters={text_file}"], length=32, tokens=200)
            card.keep(Record.read(out).with_evaluation(report))
            folders[name] = out
        return folders[name]

    return get


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Line:
    return Line(monkeypatch, capsys)


@pytest.fixture
def source(family_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny mixtral that a test may damage."""
    return Path(shutil.copytree(family_folder("mixtral"), tmp_path / "source"))
