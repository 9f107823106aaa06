"""Which lm-eval tasks a name means: lm-eval's own tasks and groups, sets/moe-i2-nine.yaml, task files from folders, and `FORM=FILE`: a
jsonl file in one of the forms that forms/*.yaml describe (blimp, rte3), which needs no network.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trimoe.errors import UserError, first_line, stop_if_told
from trimoe.evaluate.quiet import quiet
from trimoe.evaluate.seeded import FEWSHOT_SEED, seeded
from trimoe.progress import Reporter

HERE = Path(__file__).parent
FORMS = {path.stem: path for path in sorted((HERE / "forms").glob("*.yaml"))}


@dataclass
class TaskSet:
    """lm-eval's Task and Group objects in the order asked for (`top`), and all tasks in them by name."""

    top: list[Any] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, loaded: dict[str, Any]) -> None:
        """What lm-eval loaded for a name: a task, a group, or (for a tag) several tasks."""
        groups, tasks = loaded.get("groups", {}), loaded["tasks"]
        self.top += [groups[name]] if name in groups else [task for key, task in tasks.items() if key not in self.tasks]
        self.tasks |= tasks


def require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError("Tasks need lm-eval, which is not installed; pip install 'trimoe[eval]'") from None


def check_asked(tasks: Sequence[str], **options: Any) -> None:
    """Raises UserError where something is asked of tasks and there are none."""
    given = [name for name, value in options.items() if value is not None and value != [] and value != ()]
    if given and not tasks:
        raise UserError(f"{given[0]} is about tasks, and none are given; name some (--tasks) or leave it out.")


def find(names: Sequence[str], include: Sequence[str | os.PathLike[str]], fewshot: int | None, reporter: Reporter) -> TaskSet:
    """The tasks, their data loaded. Raises UserError where a name, a file or its data cannot be had."""
    require()
    with quiet(bars=False), seeded():
        found, index = TaskSet(), None
        for name in dict.fromkeys(names):
            form, _, path = name.partition("=")
            if path:
                found.add(form, _of_form(form, Path(path).expanduser()))
                continue
            index = index or _index([given for given in names if "=" not in given], include, reporter)
            for one in index.match_tasks([name]) if any(letter in name for letter in "*?[") else [name]:
                if one not in index.task_index:
                    raise UserError(_unknown(one, index.all_tasks))
                found.add(one, _load(index, one))
    for task in found.tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"The task {task.task_name!r} runs code that models write; trimoe does not do that.")
        # as lm-eval's own command does: a task that asks for 0 examples keeps to it
        if fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return found


def average(group: Any) -> bool:
    """Whether a group's members count alike, whatever their size (`metadata: {average: members}` in its YAML)."""
    return (group.metadata or {}).get("average") == "members"


def _index(names: Sequence[str], include: Sequence[str | os.PathLike[str]], reporter: Reporter) -> Any:
    """lm-eval's TaskManager; its own 14,000 task files are read (10 s and more) only where a name is not in the given folders."""
    from lm_eval.tasks import TaskManager

    for folder in include:
        if not Path(folder).is_dir():
            raise UserError(f"--include {folder} is not a folder; one with lm-eval task files (*.yaml) is expected.")
    folders = [str(HERE / "sets"), *map(str, include)]
    without = TaskManager(include_path=folders, include_defaults=False)
    if all(_whole(name, without.task_index) for name in names):
        return without
    reporter.say("Reading lm-eval's list of tasks ...")
    return TaskManager(include_path=folders)


def _whole(name: Any, index: dict[str, Any]) -> bool:
    """Whether a name and, for a group, all that is in it is in the index."""
    if not isinstance(name, str) or name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return all(_whole(member, index) for member in members) if isinstance(members, list) else True


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    near = f"; similar: {', '.join(close)}" if close else ""
    return (
        f"There is no task {name!r} (lm-eval's tasks and groups, moe-i2-nine, those of --include folders, and FORM=FILE.jsonl with FORM one of "
        f"{', '.join(FORMS)} are known){near}."
    )


def _load(index: Any, name: str) -> Any:
    try:
        return index.load([name])
    except UserError:
        raise
    except Exception as error:  # datasets, huggingface_hub, fsspec, jinja2 and task files raise anything
        stop_if_told(error)
        raise UserError(
            f"The task {name!r} or its data could not be loaded ({first_line(error)}). Tasks read their data from the Hugging Face hub; without a network give "
            "task files that read local ones (--include FOLDER; benchmarks/eval_offline.py makes such a folder) or FORM=FILE.jsonl."
        ) from None


# ---- files


def _of_form(form: str, path: Path) -> dict[str, Any]:
    """Tasks and groups of a jsonl file in one of the known forms."""
    from datasets import Dataset
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask

    if form not in FORMS:
        raise UserError(f"There is no form {form!r} for tasks from files; there are: {', '.join(FORMS)} (FORM=FILE.jsonl).")
    body = yaml.safe_load(FORMS[form].read_text(encoding="utf-8"))
    rows = _rows(path, body.pop("fields"))
    key = body.pop("group_by", None)

    def task(name: str, own: list[dict[str, Any]]) -> Any:
        return ConfigurableTask(
            config={
                **body,
                "task": name,
                "custom_dataset": lambda **_: {"test": Dataset.from_list(own)},
                "metadata": dict(body["metadata"]),
            }
        )

    if key is None:
        return {"tasks": {form: task(form, rows)}}
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault(str(row[key]), []).append(row)
    group = Group.from_config(
        {"group": form, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}], "metadata": body["metadata"]}
    )
    tasks = {f"{form}_{name}": task(f"{form}_{name}", own) for name, own in parts.items()}
    for made in tasks.values():
        group.add(made)
    return {"tasks": tasks, "groups": {form: group}}


def _rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows.append({name: row[name] for name in fields})
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number} is not a JSON object with {', '.join(fields)}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"The task file {path} cannot be read ({error.strerror}).") from None
    if not rows:
        raise UserError(f"The task file {path} has no line in it.")
    return rows
