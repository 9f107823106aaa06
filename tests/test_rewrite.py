"""A finished folder with other numbers in it: what is put is there, everything else is as it was, and killed runs go on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from refusals import snapshot
from safetensors.torch import load_file

from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import Diverged
from trimoe.output import rewriter as rewrite
from trimoe.output.rewriter import Rewriter

Family = Callable[[str], Path]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def new_values(source: Checkpoint) -> dict[str, torch.Tensor]:
    """Other numbers for one tensor of the first shard and two of the last."""
    files = source.files()
    assert len(files) > 2
    first = next(key for key, info in source.stored.items() if info.file == files[0])
    last = [key for key, info in source.stored.items() if info.file == files[-1]][:2]
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(source.stored[key].shape, generator=generator) for key in (first, *last)}


def test_without_new_values_the_copy_is_the_source(family_folder: Family, tmp_path: Path) -> None:
    source = family_folder("mixtral")
    before = snapshot(source)
    rewriter = Rewriter(Checkpoint.open(source), tmp_path / "out")
    rewriter.begin()
    assert not (tmp_path / "out" / "config.json").exists(), "an unfinished folder must not look like a model"
    rewriter.finish({})
    assert snapshot(tmp_path / "out") == before == snapshot(source)
    rewriter.finish({})
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exactly_what_is_put_changes(dtype: torch.dtype, tmp_path: Path) -> None:
    families.save("mixtral", tmp_path / "source", shard="20KB", dtype=dtype)
    source = Checkpoint.open(tmp_path / "source")
    before, old, values = snapshot(source.folder), tensors_of(source.folder), new_values(source)
    rewriter = Rewriter(source, tmp_path / "out")
    rewriter.begin()
    rewriter.put(values)
    assert all(torch.equal(rewriter.read(key), value.to(dtype)) for key, value in values.items())
    rewriter.finish({})
    now = tensors_of(tmp_path / "out")
    assert now.keys() == old.keys()
    for key in old:
        assert now[key].dtype == old[key].dtype == dtype
        assert torch.equal(now[key], values[key].to(dtype) if key in values else old[key]), key
    assert snapshot(source.folder) == before


def test_side_files_replace_those_of_the_source_and_config_is_last(
    family_folder: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    for name in ("write_text", "copy_file"):
        real = getattr(rewrite, name)
        monkeypatch.setattr(rewrite, name, lambda a, b, real=real: (real(a, b), written.append(b.name if isinstance(b, Path) else a.name)))
    rewriter = Rewriter(Checkpoint.open(family_folder("mixtral")), tmp_path)
    rewriter.begin()
    rewriter.finish({"README.md": "new\n", "config.json": "{}\n", "tokenizer_config.json": "{}\n"})
    assert written[-1] == "config.json" and written.count("config.json") == written.count("tokenizer_config.json") == 1
    assert (tmp_path / "README.md").read_text() == "new\n" and (tmp_path / "tokenizer_config.json").read_text() == "{}\n"
    assert (tmp_path / "tokenizer.json").is_file() and not list(tmp_path.glob("*.part"))


class Cut(RuntimeError):
    pass


def stop() -> None:
    raise Cut


def cut_copying(patch: pytest.MonkeyPatch) -> None:
    copied, real = iter(range(100)), rewrite.copy_file
    patch.setattr(rewrite, "copy_file", lambda a, b: stop() if next(copied) == 1 else real(a, b))


def cut_renaming(patch: pytest.MonkeyPatch) -> None:
    """One shard has its name, the second has not."""
    named, real = iter(range(100)), os.replace
    patch.setattr(os, "replace", lambda a, b: stop() if str(b).endswith(".safetensors") and next(named) == 1 else real(a, b))


def cut_before_config(patch: pytest.MonkeyPatch) -> None:
    real = rewrite.copy_file
    patch.setattr(rewrite, "copy_file", lambda a, b: stop() if b.name == "config.json" else real(a, b))


def whole_run(source: Checkpoint, out: Path, *, put: bool = True) -> None:
    rewriter = Rewriter(source, out)
    rewriter.begin()
    if put:
        rewriter.put(new_values(source))
    rewriter.finish({"trimoe.json": "{}\n"})


@pytest.mark.parametrize("cut", [cut_copying, cut_renaming, cut_before_config])
def test_a_killed_run_goes_on(cut: Callable[[pytest.MonkeyPatch], None], family_folder: Family, tmp_path: Path) -> None:
    source, out = Checkpoint.open(family_folder("mixtral")), tmp_path / "cut"
    assert len(source.files()) > 2
    before = snapshot(source.folder)
    whole_run(source, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        cut(patch)
        with pytest.raises(Cut):
            whole_run(source, out)
    assert not (out / "config.json").exists()
    whole_run(source, out, put=cut is cut_copying)  # what was put is there
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert snapshot(source.folder) == before


def test_a_shard_that_was_half_copied_is_copied_again(family_folder: Family, tmp_path: Path) -> None:
    source = Checkpoint.open(family_folder("mixtral"))
    half = tmp_path / f"{source.files()[0]}.part"
    half.write_bytes((source.folder / source.files()[0]).read_bytes()[:100])
    whole_run(source, tmp_path, put=False)
    assert {**snapshot(tmp_path), "trimoe.json": ""} == {**snapshot(source.folder), "trimoe.json": ""}


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e6])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_written(wrong: float, tmp_path: Path) -> None:
    families.save("mixtral", tmp_path / "source", dtype=torch.float16)
    source = Checkpoint.open(tmp_path / "source")
    rewriter, values = Rewriter(source, tmp_path / "out"), new_values(source)
    rewriter.begin()
    before, key = snapshot(tmp_path / "out"), list(values)[-1]
    values[key].view(-1)[3] = wrong
    with pytest.raises(Diverged, match=key.replace(".", r"\.")):
        rewriter.put(values)
    assert snapshot(tmp_path / "out") == before


def test_other_shapes_and_unknown_names_are_mistakes_of_the_caller(family_folder: Family, tmp_path: Path) -> None:
    source = Checkpoint.open(family_folder("mixtral"))
    rewriter, key = Rewriter(source, tmp_path), next(iter(source.stored))
    rewriter.begin()
    with pytest.raises(AssertionError, match="shape"):
        rewriter.put({key: torch.zeros(3)})
    with pytest.raises(AssertionError, match="nowhere"):
        rewriter.put({"nowhere": torch.zeros(3)})
    with pytest.raises(AssertionError, match="never written"):
        Rewriter(source, source.folder)
