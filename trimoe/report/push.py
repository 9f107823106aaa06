"""A finished folder to the hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from trimoe.checkpoint.shards import weight_files
from trimoe.errors import UserError, first_line
from trimoe.journal import FOLDER
from trimoe.output import card
from trimoe.output.record import Record

CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP client that huggingface_hub uses: no network, no name, no answer
LEFT_OUT = [f"{FOLDER}/*", "*.part", "*.log", ".cache/*"]  # what runs leave, and what is only half there


def push(folder: str | Path, repo: str, *, private: bool = True, message: str | None = None, revision: str | None = None) -> str:
    """Upload `folder` to the model repository `repo` ("user/name"), which is made if it is not there (`private` then). Returns its address.

    Raises UserError for folders that are not finished or lack files, for names that are none, and with the hub's words where it refuses.
    """
    finished = Record.finished(Path(folder))
    _check(finished)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no repository name: {error}") from None
    if "/" not in repo:
        raise UserError(f"{repo!r} does not say whose repository it is; give USER/NAME.")
    api: Any = HfApi(library_name="trimoe")
    steps = " + ".join(step.name for step in finished.steps)
    try:
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, repo_type="model", folder_path=str(finished.folder), ignore_patterns=LEFT_OUT, revision=revision,
            commit_message=message or f"{finished.model} by trimoe {finished.version}: {steps}",
        )  # fmt: skip
    except HfHubHTTPError as error:
        raise UserError(f"The hub refused {repo}: {str(error).splitlines()[0].rstrip('.')}. Log in with: hf auth login") from error
    except CLIENT_ERROR as error:
        raise UserError(f"The hub cannot be reached: {first_line(error)}.") from error
    return str(getattr(done, "repo_url", None) or f"https://huggingface.co/{repo}")


def _check(finished: Record) -> None:
    """No run is under way, and every file that the index names is there."""
    folder = finished.folder
    if (folder / FOLDER).is_dir():
        raise UserError(f"{folder} holds {FOLDER}: a run in it was not finished; start it again, then push.")
    card.check(Record.read(folder))
    missing = sorted(name for name in {*weight_files(folder), "README.md"} if not (folder / name).is_file())
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; it is not complete, so it is not uploaded.")
