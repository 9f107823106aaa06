"""Runs that are killed, that find no room on the disk or no permission, and that are started twice: the same bytes in the end, or one
sentence. The kills themselves are in benchmarks/kills.py."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from refusals import FACTORED, UNIFORM, Line, snapshot
from safetensors.torch import save_file

import trimoe
from trimoe.checkpoint import free_disk
from trimoe.checkpoint.atomic import aside, disk_errors
from trimoe.errors import UserError
from trimoe.journal import FOLDER, Journal
from trimoe.output.rewriter import Rewriter
from trimoe.output.writer import Writer
from trimoe.progress import LOG

Family = Callable[[str], Path]
ROOT = Path(__file__).resolve().parents[1]
TRAINED = {**UNIFORM, "recover": {"method": "lora", "samples": 8, "length": 32, "batch": 4, "holdout": 0.25, "rank": 2}}
TRAIN = ["--method", "lora", "--samples", "8", "--length", "32", "--set", "batch=4", "--set", "holdout=0.25", "--set", "rank=2"]


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_to_the_same_bytes(with_trimoe: Forks) -> None:
    """Some of the runs that `make nightly` kills more often."""
    cases = "moe-i2,gptq,layer-drop,recipe-recover,lora,experts"
    done = with_trimoe.run(ROOT / "benchmarks/kills.py", "--kills", "10", "--seed", "7", "--cases", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    name, kills, wrong = done.stdout.splitlines()[-1].split()
    assert name == "all" and int(kills) >= 10 and wrong == "0"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_that_it_goes_on(
    number: int, code: int, line: Line, text_file: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, log = compressing(source, text_file, tmp_path, UNIFORM), tmp_path / "cut" / "out" / LOG
    before = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)} | {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in the background
    }

    def fail() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "put", lambda *_: os.kill(os.getpid(), number))
            assert line.run(*words) == (code, "", "trimoe: stopped. The same command goes on where this one was.\n")
        assert "  Stopped: " in log.read_text()

    try:
        both(line, tmp_path, words, fail)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_a_damaged_journal_is_named(line: Line, text_file: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = compressing(source, text_file, tmp_path, UNIFORM)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert line.run(*words)[0] == 143
    for name in ("decisions-0.json", "inputs.json"):
        (tmp_path / "out" / FOLDER / name).write_text("")
        line.refused(f"{name}, by which the run would go on, is damaged; delete out/{FOLDER} to begin it again", *words)


def test_a_mistake_in_a_resumed_run_leaves_a_folder_that_can_be_used(
    line: Line, text_file: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, then a mistake that leaves nothing to go on with, then the command that is right."""
    words = compressing(source, text_file, tmp_path, UNIFORM)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put_stats", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert line.run(*words)[0] == 143
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put_stats", lambda *_: (_ for _ in ()).throw(UserError("a mistake")))
        line.refused("a mistake", *words)
    assert line.run(*words)[0] == 0


def test_told_twice_to_stop(source: Path, text_file: Path, with_trimoe: Forks, tmp_path: Path) -> None:
    """The second Ctrl-C, in the middle of tidying up, ends the process without a traceback."""
    words = ["trimoe", *map(str, compressing(source, text_file, tmp_path, UNIFORM))]
    stopping = f"""
import os, signal, sys
sys.argv = {words!r}
signal.signal(signal.SIGINT, signal.default_int_handler)
from trimoe import cli
from trimoe.output.writer import Writer

def put(*_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)

Writer.put = put
cli.main()
"""
    done = with_trimoe.run("-c", stopping, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_while_the_libraries_load() -> None:
    stopping = """
import os, signal, sys
sys.argv = ["trimoe", "inspect", "builtin:mini-mixtral"]

class Stop:
    def find_spec(self, module, *_):
        if module == "transformers.modeling_utils":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Stop())
from trimoe.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", stopping], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# ---- the disk


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Writing beyond it is an OSError, as on a full disk (Python ignores the signal)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Something mounted over a folder, where that is allowed."""
    done = subprocess.run(["mount", *options, folder], capture_output=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip("mounting takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a failed run may still hold a file open


def failed(line: Line, words: list[Any], message: str) -> None:
    """Exit code 1, one sentence, and nothing that looks like a model."""
    code, out, err = line.run(*words)
    assert (code, out) == (1, ""), err
    assert err.count("\n") == 1 and err.startswith("trimoe: ") and message in err, err


def compressing(source: Path, text: Path, folder: Path, recipe: dict[str, Any]) -> list[Any]:
    (folder / "mine.yaml").write_text(json.dumps(recipe))
    return ["compress", source, "-r", folder / "mine.yaml", "-o", "out", "-c", text, "--samples", "4", "--length", "32", "-q"]


def both(line: Line, folder: Path, words: list[Any], fail: Callable[[], None]) -> None:
    """Uninterrupted in one folder, and in another one after a failure: the same bytes."""
    for name in ("whole", "cut"):
        (folder / name).mkdir(exist_ok=True)
        line.monkeypatch.chdir(folder / name)
        if name == "cut":
            fail()
            assert not (folder / name / "out" / "config.json").exists()
        code, _, err = line.run(*words)
        assert (code, err) == (0, "")
    assert snapshot(folder / "cut" / "out") == snapshot(folder / "whole" / "out")


@pytest.mark.parametrize("room", [100, 1500, 20_000, 50_000, 90_000])
def test_a_full_disk_while_compressing(room: int, family_folder: Family, text_file: Path, tmp_path: Path, line: Line) -> None:
    words = compressing(family_folder("mixtral"), text_file, tmp_path, FACTORED)

    def fail() -> None:
        with largest_file(room):
            failed(line, words, "File too large")

    both(line, tmp_path, words, fail)


@pytest.mark.parametrize("room", [100, 2000, 20_000])
def test_a_full_disk_while_training(room: int, family_folder: Family, text_file: Path, tmp_path: Path, line: Line) -> None:
    trimoe.compress(family_folder("mixtral"), UNIFORM, tmp_path / "made", calibration=[str(text_file)], samples=4, length=32)
    words = ["recover", tmp_path / "made", "-o", "out", "-q", *TRAIN]

    def fail() -> None:
        with largest_file(room):
            failed(line, words, "out")

    both(line, tmp_path, words, fail)


def test_no_space_left(family_folder: Family, text_file: Path, tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    words = compressing(family_folder("mixtral"), text_file, tmp_path, FACTORED)
    small = tmp_path / "small"
    small.mkdir()
    with mounted(small, "-t", "tmpfs", "-o", "size=200k", "none"):
        line.monkeypatch.chdir(small)
        line.refused("of disk", *words)
        monkeypatch.setattr(free_disk, "check", lambda out, wanted, spill: None)
        failed(line, words, "No space left on device")
        shutil.copytree(small / "out", tmp_path / "cut" / "out")
        line.monkeypatch.chdir(tmp_path)
    both(line, tmp_path, words, lambda: None)


@pytest.mark.parametrize("recipe", [UNIFORM, TRAINED])
def test_a_folder_that_cannot_be_written_to(
    recipe: dict[str, Any], family_folder: Family, text_file: Path, tmp_path: Path, line: Line
) -> None:
    words = compressing(family_folder("mixtral"), text_file, tmp_path, recipe)
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    with mounted(fixed, "-t", "tmpfs", "-o", "ro", "none"):
        line.monkeypatch.chdir(fixed)
        failed(line, words, "Read-only file system")
        line.monkeypatch.chdir(tmp_path)


def test_a_folder_of_someone_elses(family_folder: Family, text_file: Path, line: Line) -> None:
    """Refused by permission, then allowed: the same bytes."""
    if os.geteuid() != 0:
        pytest.skip("being someone else takes root")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        shutil.copytree(family_folder("mixtral"), Path(folder, "model"))
        text = Path(shutil.copy(text_file, folder))
        words = compressing(Path(folder, "model"), text, Path(folder), FACTORED)
        os.chmod(folder, 0o755)

        def fail() -> None:
            os.seteuid(65534)
            try:
                failed(line, words, "could not be read or written: Permission denied. Run the same command again once that is mended.")
            finally:
                os.seteuid(0)

        both(line, Path(folder), words, fail)


def test_what_cannot_be_written_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4096)}
    writers: list[Callable[[Path], Any]] = [
        lambda part: save_file(tensors, part), lambda part: torch.save(tensors, part), lambda part: part.write_bytes(bytes(9999)),
    ]  # fmt: skip
    for number, write in enumerate(writers):
        with largest_file(5000), pytest.raises(OSError, match=f"file-{number}"), aside(tmp_path / f"file-{number}") as part:
            write(part)
        assert not (tmp_path / f"file-{number}").exists()
        with aside(tmp_path / f"file-{number}") as part:
            write(part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file-0", "file-1", "file-2"]
    with pytest.raises(RuntimeError, match="mine"), disk_errors(tmp_path):
        raise RuntimeError("mine")


def test_killed_before_the_first_half_of_a_recipe_was_tidied_up(
    family_folder: Family, text_file: Path, tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = compressing(family_folder("mixtral"), text_file, tmp_path, TRAINED)

    def stop(journal: Journal) -> None:
        raise KeyError("power cut")

    def fail() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "close", stop)
            with pytest.raises(KeyError, match="power cut"):
                line.run(*words)

    both(line, tmp_path, words, fail)


def test_killed_while_a_finished_recipe_was_tidied_up(
    family_folder: Family, text_file: Path, tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal that is left is the training's, whose inputs are not those of the recipe."""
    words = compressing(family_folder("mixtral"), text_file, tmp_path, TRAINED)
    closed = Journal.close
    line.monkeypatch.chdir(tmp_path)

    def stop(journal: Journal) -> None:
        if journal.out == Path("out"):
            raise KeyError("power cut")
        closed(journal)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", stop)
        with pytest.raises(KeyError, match="power cut"):
            line.run(*words)
    assert (tmp_path / "out" / FOLDER / "inputs.json").is_file() and (tmp_path / "out" / "config.json").is_file()
    made = {name: value for name, value in snapshot(tmp_path / "out").items() if not name.startswith(FOLDER)}
    assert line.run(*words)[0] == 0
    assert snapshot(tmp_path / "out") == made


@pytest.mark.parametrize("lost", ["weights", "tokenizer", "config.json", "generation_config.json", "damaged configuration"])
def test_a_finished_folder_that_lost_a_file_is_not_finished(
    lost: str, family_folder: Family, text_file: Path, tmp_path: Path, line: Line
) -> None:
    words = compressing(family_folder("mixtral"), text_file, tmp_path, UNIFORM)
    line.monkeypatch.chdir(tmp_path)
    assert line.run(*words)[0] == line.run(*words)[0] == 0
    training = ["recover", "out", "-o", "trained", "-q", *TRAIN]
    assert line.run(*training)[0] == line.run(*training)[0] == 0
    for name, again in (("out", words), ("trained", training)):
        shutil.copytree(name, tmp_path / "kept")
        folder = tmp_path / name
        if lost == "weights":
            next(folder.glob("*.safetensors")).unlink()
        elif lost == "tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        elif lost.startswith("damaged"):
            (folder / "config.json").write_text((folder / "config.json").read_text() + "}")
        else:
            (folder / lost).unlink()
        line.refused(f"{name} was finished and is no longer whole: ", *again)
        shutil.rmtree(folder)
        (tmp_path / "kept").rename(folder)
    adapter = ["recover", "out", "-o", "adapter", "-q", "--adapter", *TRAIN]
    assert line.run(*adapter)[0] == line.run(*adapter)[0] == 0
    (tmp_path / "adapter" / ("adapter_config.json" if lost == "config.json" else "adapter_model.safetensors")).unlink()
    line.refused("adapter was finished and is no longer whole: it has no adapter_", *adapter)


# ---- two at once, and the source


@pytest.mark.parametrize("recipe", [UNIFORM, TRAINED])
def test_a_second_compress_is_refused(recipe: dict[str, Any], family_folder: Family, text_file: Path, tmp_path: Path, line: Line) -> None:
    words = compressing(family_folder("mixtral"), text_file, tmp_path, recipe)
    line.monkeypatch.chdir(tmp_path)
    refused = []

    def busy(real: Callable[..., None]) -> Callable[..., None]:
        def finish(*given: Any) -> None:
            line.refused("Another run is writing to", *words)
            refused.append(real.__qualname__)
            real(*given)

        return finish

    with line.monkeypatch.context() as patch:
        for kind in (Writer, Rewriter):
            patch.setattr(kind, "finish", busy(kind.finish))
        code, _, _ = line.run(*words)
    assert code == 0
    assert refused == (["Writer.finish", "Rewriter.finish"] if "recover" in recipe else ["Writer.finish"])
    assert not (tmp_path / "out" / FOLDER).exists()


def test_a_second_recover_is_refused_and_the_sources_stay_as_they_were(
    family_folder: Family, text_file: Path, tmp_path: Path, line: Line
) -> None:
    source = Path(shutil.copytree(family_folder("mixtral"), tmp_path / "source"))
    before = state(source)
    line.monkeypatch.chdir(tmp_path)
    line.run(*compressing(source, text_file, tmp_path, UNIFORM))
    (tmp_path / "out").rename(tmp_path / "made")
    made = state(tmp_path / "made")
    for path in (*source.rglob("*"), *(tmp_path / "made").rglob("*")):
        path.chmod(0o444)
    words = ["recover", tmp_path / "made", "-o", "out", "-q", *TRAIN]
    words[words.index("lora")] = "logits"
    out = tmp_path / "out"
    out.mkdir()
    with Journal(out, {}):
        (out / FOLDER / "inputs.json").unlink()  # the inputs are not what this is about
        line.refused("Another run is writing to", *words)
    code, _, err = line.run(*words)
    assert (code, err) == (0, "")
    assert state(source) == before and state(tmp_path / "made") == made


def state(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    return snapshot(folder), {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
