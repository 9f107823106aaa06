"""What plan says of passes over the model, against the bytes that a run really reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trimoe
from trimoe.checkpoint import folder
from trimoe.model.skeleton import Skeleton
from trimoe.output.writer import Writer
from trimoe.plan.passes import passes
from trimoe.recipe.recipe import load, with_calibration

DROP = {"expert_drop": {"ratio": 0.25, "counts": "uniform", "search": "greedy"}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "copied": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "score": "frequency", "search": "none"}}],
    "sensitivity": [{"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy"}}],
    "receptive field": [{"expert_drop": {**DROP["expert_drop"], "receptive_field": {"k": 2, "t": 2}}}],
    "rerank": [{"layer_drop": {"count": 1, "rerank": "kl"}}, DROP],
    "blocks, then factors": [{"block_drop": {"count": 1}}, {"low_rank": {"ratio": 0.3, "rank": "uniform"}}],
    "gptq": [DROP, {"quantize": {"bits": 4, "group": 8}}],
    "magnitude": [{"weight_prune": {"ratio": 0.5, "score": "magnitude"}}],
}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_reads_and_writes_what_plan_says(
    name: str, family: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, counted = str(family_folder(family)), [0]
    fill, copy, job_of = folder._fill, Writer._copy, trimoe.compress.__globals__["job_of"]

    def filled(file: Any, piece: Any, key: str, info: Any) -> None:
        counted[0] += piece.numel()
        fill(file, piece, key, info)

    def copied(self: Writer, entry: Any, file: Any) -> None:
        counted[0] += self.source.tensors[entry.source].nbytes if entry.axis is None else 0
        copy(self, entry, file)

    def begun(*args: Any, **kwargs: Any) -> Any:
        job = job_of(*args, **kwargs)
        counted[0] = 0  # the fingerprint has been read
        return job

    monkeypatch.setattr(folder, "_fill", filled)
    monkeypatch.setattr(Writer, "_copy", copied)
    monkeypatch.setitem(trimoe.compress.__globals__, "job_of", begun)
    parsed = with_calibration(load({"steps": RECIPES[name]}), [str(text_file)], 6, 32)
    made = trimoe.compress(source, parsed, tmp_path / "out")
    rows = passes(Skeleton.of(source), parsed, 6 * 32)
    assert counted[0] == sum(row["read_bytes"] for row in rows)
    assert rows[-1]["written_bytes"] >= sum(path.stat().st_size for path in made.out.glob("*.safetensors")) - 100_000
    assert {row["tokens"] for row in rows} <= {0, 6 * 32} and all(row["passes"] >= 1 for row in rows)
