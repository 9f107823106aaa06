"""Uploading: what is sent, and what is refused before anything is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import Line

import trimoe
from trimoe import UserError
from trimoe.report import push as module

Family = Callable[[str], Path]


class Hub:
    """A stand-in for HfApi that remembers what it was asked."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 (cleared by the fixture)
    fails: Exception | None = None

    def __init__(self, **_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*args: Any, **fields: Any) -> Any:
            if Hub.fails is not None:
                raise Hub.fails
            Hub.asked.append((name, {**fields, **({"repo_id": args[0]} if args else {})}))
            return SimpleNamespace(repo_url="https://huggingface.co/me/small")

        return ask


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(module, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "fails", None)
    return Hub


@pytest.fixture(scope="module")
def finished(family_folder: Family, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "out"
    trimoe.compress(family_folder("mixtral"), "expert-drop", out, calibration=[str(text_file)], samples=4, length=32)
    return out


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_a_finished_folder_is_uploaded_privately(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, err = Line(monkeypatch, capsys).run("push", folder, "me/small")
    assert (code, err) == (0, "") and "https://huggingface.co/me/small" in printed
    (made, fields), (sent, what) = hub.asked
    assert made == "create_repo" and fields == {"repo_id": "me/small", "repo_type": "model", "private": True, "exist_ok": True}
    assert (
        sent == "upload_folder"
        and what["folder_path"] == str(folder)
        and what["repo_id"] == "me/small"
        and "expert_drop" in what["commit_message"]
    )
    assert ".trimoe/*" in what["ignore_patterns"]


def test_public_message_and_branch(folder: Path, hub: type[Hub]) -> None:
    module.push(folder, "me/small", private=False, message="mine", revision="try")
    (_, made), (branched, branch), (_, sent) = hub.asked
    assert made["private"] is False and branched == "create_branch" and branch["branch"] == "try"
    assert sent["commit_message"] == "mine" and sent["revision"] == "try"


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("small", "does not say whose"),
        *((name, "is no repository name") for name in ("a/b/c", "me/../x", "me/small name", "me/-small", "")),
    ],
)
def test_names_that_are_none(
    repo: str, message: str, folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Line(monkeypatch, capsys).refused(message, "push", folder, repo)
    assert hub.asked == []


def test_unfinished_folders_are_refused(
    folder: Path, family_folder: Family, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = Line(monkeypatch, capsys)
    line.refused("is no finished trimoe folder", "push", family_folder("mixtral"), "me/small")
    (folder / ".trimoe").mkdir()
    line.refused("a run in it was not finished", "push", folder, "me/small")
    (folder / ".trimoe").rmdir()
    shard = next(folder.glob("*.safetensors"))
    shard.rename(tmp_path / shard.name)
    line.refused(f"lacks {shard.name}", "push", folder, "me/small")
    (folder / "config.json").unlink()
    line.refused("is no finished trimoe folder", "push", folder, "me/small")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("trimoe.json", "{"),
        ("trimoe.json", "[]"),
        ("trimoe.json", {"recipe": {}}),
        ("trimoe.json", {"recipe": {"steps": [{}]}}),
        ("trimoe.json", {"plan": {}}),
        ("trimoe.json", {"metrics": []}),
        ("trimoe.json", {"plan": {"layers": None}}),
        ("model.safetensors.index.json", "{"),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../config.json"}}'),
    ],
)
def test_damaged_folders_are_one_sentence(
    file: str, text: str | dict[str, Any], folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / file
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    line = Line(monkeypatch, capsys)
    line.refused("index" if "trimoe" not in file else "trimoe.json", "push", folder, "me/small")
    assert hub.asked == []


def test_what_the_hub_says_is_one_sentence(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    hub.fails = HfHubHTTPError("401 Client Error: Unauthorized\nmore", response=SimpleNamespace(headers={}, request=None, status_code=401))  # type: ignore[arg-type]
    Line(monkeypatch, capsys).refused("The hub refused me/small: 401 Client Error: Unauthorized", "push", folder, "me/small")


def test_no_network_is_one_sentence(folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "fails", module.CLIENT_ERROR("[Errno -3] name resolution\nmore"))
    with pytest.raises(UserError, match=r"The hub cannot be reached: \[Errno -3\] name resolution\.$"):
        module.push(folder, "me/small")


def test_logs_stay_here(folder: Path, hub: type[Hub]) -> None:
    module.push(folder, "me/small")
    assert "*.log" in dict(hub.asked)["upload_folder"]["ignore_patterns"]
