"""lm-eval's tasks in process, the original and the compressed model side by side on the same documents.

Values and standard errors are lm-eval's. A difference is paired: that of the two models on each document, with the standard error of its
mean, which is much smaller than two separate errors would make it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimoe.errors import UserError
from trimoe.evaluate.cache import ResultCache, digest, identity
from trimoe.evaluate.generation import fits
from trimoe.evaluate.quiet import quiet
from trimoe.evaluate.seeded import seeded
from trimoe.evaluate.taskset import TaskSet, average
from trimoe.model.skeleton import Skeleton
from trimoe.progress import Reporter
from trimoe.text.samples import load_tokenizer
from trimoe.walk.walk import give_back

RESAMPLES, SEED = 200, 0  # bootstrap of metrics that are not means
OR_ACC = "acc_norm or acc"  # of averages: length-normalised accuracy of the members that have it


@dataclass(frozen=True, kw_only=True)
class How:
    """`stream` None: where the model does not fit in memory, or has packed experts."""

    limit: int | None
    batch: int
    stream: bool | None
    device: str


def _writing(tasks: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until")


def check(found: TaskSet, how: How) -> None:
    """Raises UserError for what cannot be run as asked."""
    if how.stream and (writes := _writing(found.tasks)):
        raise UserError(
            f"The task {writes[0]!r} lets the model write, which a streamed model cannot do in reasonable time; leave it out or give --no-stream."
        )


def compare(
    found: TaskSet, models: Mapping[str, Skeleton], how: How, *, cache: ResultCache, reporter: Reporter
) -> dict[str, Any]:  # fmt: skip
    """`tasks`: one row a task and metric, then those of its groups; `task_settings`: how they were run."""
    import lm_eval

    with quiet(bars=reporter.mode == "auto"), seeded():
        results, ran = {}, {}
        for name, skeleton in models.items():
            results[name], ran[name] = _measured(found, skeleton, how, cache, reporter)
        table = _TaskRows(found, results)
        rows = [row for item in found.top for row in table.rows(item, None)]
    settings = {
        "lm_eval": lm_eval.__version__, "limit": how.limit, "context": min(skeleton.context for skeleton in models.values()),
        "ran": ran,
    }  # fmt: skip
    return {"tasks": rows, "task_settings": settings}


# ---- one model


def _measured(
    found: TaskSet, skeleton: Skeleton, how: How, cache: ResultCache, reporter: Reporter
) -> tuple[dict[str, dict[str, Any]], str]:  # fmt: skip
    """Task -> {"n", "cut", "metrics": {"metric,filter": {docs, values}}}; and how the tasks were run that were not in the cache."""
    import lm_eval
    from lm_eval import evaluator

    who = identity(skeleton.checkpoint)
    depends = {
        name: {
            "kind": "task", "model": who, "task": task_identity(task, how.limit), "limit": how.limit, "lm_eval": lm_eval.__version__,
            "dtype": str(skeleton.dtype), "device": torch.device(how.device).type, "context": skeleton.context,
        }
        for name, task in found.tasks.items()
    }  # fmt: skip
    known = {name: value for name in found.tasks if (value := cache.get(depends[name])) is not None}
    if known:
        reporter.say(f"Tasks: {len(known)} of {len(found.tasks)} measured before for {skeleton.name}, taken from the cache.")
    new = {name: task for name, task in found.tasks.items() if name not in known}
    if not new:
        return known, "cache"
    unasked = how.stream is None and not _writing(new) and (skeleton.checkpoint.scheme is not None or not fits(skeleton, how.device))
    stream = how.stream or unasked
    reporter.say(f"Running {len(new)} tasks on {skeleton.name}, {'layer by layer' if stream else 'in memory'} ...")
    lm = _lm(skeleton, how, stream, reporter)
    result = evaluator.evaluate(lm, {"tasks": new, "groups": {}}, limit=how.limit, bootstrap_iters=0, log_samples=True)
    cut = dict(lm.cut)
    del lm
    give_back()
    for name in new:
        known[name] = _kept(result["samples"][name]) | {"cut": cut.get(name, 0)}
        cache.put(depends[name], known[name])
    return {name: known[name] for name in found.tasks}, "streamed" if stream else "in memory"


def _lm(skeleton: Skeleton, how: How, stream: bool, reporter: Reporter) -> Any:
    from trimoe.evaluate.lm import InMemory, Streamed

    tokenizer = load_tokenizer(skeleton.checkpoint)
    if stream:
        return Streamed(skeleton, tokenizer, device=how.device, reporter=reporter)
    return InMemory(skeleton, tokenizer, device=how.device, batch=how.batch, bars=reporter.mode == "auto")


def task_identity(task: Any, limit: int | None) -> str:
    """Of a task's settings (its functions as source text) and documents, those of its examples included."""
    examples = task.fewshot_docs() if task.get_config("num_fewshot") else []
    documents = (document for _, document in task.doc_iterator(limit=limit))
    parts = (json.dumps(part, sort_keys=True, default=str).encode() for part in (task.dump_config(), *documents, *(examples or [])))
    return digest(parts)


def task_settings(found: TaskSet, limit: int | None) -> dict[str, Any]:
    """What numbers of tasks depend on beside the model: the tasks, how they are grouped and averaged, lm-eval's version."""
    import lm_eval

    def outline(item: Any) -> Any:
        if hasattr(item, "task_name"):
            return item.task_name
        return {
            "group": item.name,
            "averages": str(item.aggregate_metric_list),
            "about": str(item.metadata),
            "of": [outline(one) for one in item],
        }

    tasks = {name: task_identity(task, limit) for name, task in found.tasks.items()}
    return {"asked": [outline(item) for item in found.top], "tasks": tasks, "lm_eval": lm_eval.__version__}


def _kept(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a task's samples say, without texts. JSON, so that it is the same from the cache."""
    metrics: dict[str, dict[str, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            metrics.setdefault(f"{metric},{sample['filter']}", {})[str(sample["doc_id"])] = sample[metric]
    return json.loads(json.dumps({"n": len({sample["doc_id"] for sample in samples}), "metrics": metrics}, default=float))


# ---- numbers


def _error(aggregation: Callable[[Sequence[Any]], float], *sides: Sequence[Any]) -> float | None:
    """Standard error of the aggregated values of one side, or of the difference of two on the same documents; None for one document."""
    from lm_eval.api.metrics import mean

    count = len(sides[0])
    if count < 2:
        return None
    if aggregation is mean:
        each = np.asarray(sides[0], float) - (np.asarray(sides[1], float) if len(sides) > 1 else 0)
        return float(each.std(ddof=1) / math.sqrt(count))
    generator, drawn = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        chosen = generator.integers(count, size=count)
        first, *second = [aggregation([side[place] for place in chosen]) for side in sides]
        drawn.append(first - (second[0] if second else 0.0))
    return float(np.std(drawn, ddof=1))


class _TaskRows:
    """Rows of the report from per-document values."""

    def __init__(self, found: TaskSet, results: Mapping[str, dict[str, dict[str, Any]]]):
        self.found, self.results, self.paired = found, results, "against" in results

    def rows(self, item: Any, part_of: str | None) -> list[dict[str, Any]]:
        """Those of a task; or of a group after those of its members."""
        if hasattr(item, "task_name"):
            return self._task(item.task_name, part_of)
        inner = [row for member in item for row in self.rows(member, item.name)]
        return inner + (self._average(item, inner, part_of) if average(item) else self._group(item, inner, part_of))

    def _task(self, name: str, part_of: str | None) -> list[dict[str, Any]]:
        ours = self.results["model"][name]
        aggregations, higher = self.found.tasks[name].aggregation(), self.found.tasks[name].higher_is_better()
        made = []
        for key, by_doc in ours["metrics"].items():
            metric, _, filter_name = key.partition(",")
            aggregate = aggregations[metric]
            values = list(by_doc.values())
            row = {"task": name, "metric": metric, **({"filter": filter_name} if filter_name != "none" else {}), "n": len(values),
                   "value": float(aggregate(values)), "stderr": _error(aggregate, values)}  # fmt: skip
            if self.paired:
                theirs = self.results["against"][name]["metrics"][key]
                assert theirs.keys() == by_doc.keys(), f"{name}: not the same documents"
                other = [theirs[doc] for doc in by_doc]
                row["against"] = {"value": float(aggregate(other)), "stderr": _error(aggregate, other)}
                row["difference"] = row["value"] - row["against"]["value"]
                row["difference_stderr"] = _error(aggregate, values, other)
            made.append(
                row
                | {
                    "higher_is_better": higher.get(metric),
                    "cut": ours["cut"],
                    "fewshot": self.found.tasks[name].get_config("num_fewshot"),
                    "kind": "task",
                    "part_of": part_of,
                }
            )
        return made

    def _group(self, group: Any, inner: Sequence[dict[str, Any]], part_of: str | None) -> list[dict[str, Any]]:
        """A group as its YAML defines it: the mean over its tasks, weighted by size or alike, with lm-eval's errors."""
        made = []
        for asked in group.aggregate_metric_list or []:
            leaves = [row for row in inner if row["kind"] == "task" and row["metric"] == asked.metric]
            for filter_name in dict.fromkeys(row.get("filter") for row in leaves):
                own = [row for row in leaves if row.get("filter") == filter_name]
                row = self._joined(group.name, asked.metric, own, asked.weight_by_size, "group", part_of)
                made.append(row | ({"filter": filter_name} if filter_name else {}))
        return made

    def _average(self, group: Any, inner: Sequence[dict[str, Any]], part_of: str | None) -> list[dict[str, Any]]:
        members: dict[str, dict[str, dict[str, Any]]] = {row["task"]: {} for row in inner if row["part_of"] == group.name}
        for row in inner:
            if row["part_of"] == group.name:
                members[row["task"]][row["metric"]] = row
        made = []
        if all("acc" in member for member in members.values()):
            for metric in ("acc", "acc_norm"):
                own = [member.get(metric, member["acc"]) for member in members.values()]
                made.append(self._joined(group.name, metric if metric == "acc" else OR_ACC, own, False, "average", part_of))
        return made

    def _joined(
        self, name: str, metric: str, own: Sequence[dict[str, Any]], by_size: bool, kind: str, part_of: str | None
    ) -> dict[str, Any]:  # fmt: skip
        """The mean of rows, and its error."""
        from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

        sizes = [row["n"] for row in own]

        def error(errors: list[float | None]) -> float | None:
            if None in errors:
                return None
            return float(pooled_sample_stderr(errors, sizes) if by_size else unweighted_mean_stderr(errors))

        def mean(values: list[float]) -> float:
            return float(aggregate_subtask_metrics(values, sizes, by_size))

        row: dict[str, Any] = {
            "task": name, "metric": metric, "n": sum(sizes), "value": mean([row["value"] for row in own]), "stderr": error([row["stderr"] for row in own]),
        }  # fmt: skip
        if self.paired:
            others = [row["against"] for row in own]
            row["against"] = {"value": mean([other["value"] for other in others]), "stderr": error([other["stderr"] for other in others])}
            row["difference"] = row["value"] - row["against"]["value"]
            row["difference_stderr"] = error([row["difference_stderr"] for row in own])
        return row | {
            "higher_is_better": own[0]["higher_is_better"],
            "cut": sum(row["cut"] for row in own),
            "kind": kind,
            "part_of": part_of,
        }
