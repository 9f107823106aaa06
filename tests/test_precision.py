"""Which precision a device runs in by default, and that it is recorded as what it came to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import trimoe
from trimoe.model import precision
from trimoe.model.precision import compute_dtype

Folder = Callable[[str], Path]
DROP: dict[str, Any] = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "score": "gate"}}]}


@pytest.mark.parametrize(
    ("device", "available", "has", "wanted"),
    [
        ("cpu", True, True, torch.float32), ("cuda", True, True, torch.bfloat16), ("cuda:1", True, True, torch.bfloat16),
        ("cuda", True, False, torch.float32), ("cuda", False, False, torch.bfloat16), ("mps", False, False, torch.float32),
    ],
)  # fmt: skip
def test_auto_is_what_the_device_is_good_at(
    device: str, available: bool, has: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan may be made for a GPU on a machine that has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert compute_dtype("auto", device) == wanted
    assert compute_dtype("float32", device) == torch.float32  # what is asked for is done


def test_names_and_dtypes_are_one_spelling() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert compute_dtype(dtype) == compute_dtype(precision.dtype_name(dtype)) == compute_dtype(str(dtype)) == dtype
    for wrong in ("float64", "bf16", torch.int8):
        with pytest.raises(trimoe.UserError, match="is not one of auto, float32, bfloat16, float16"):
            compute_dtype(wrong)


def test_what_auto_came_to_be_is_recorded(family_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a run that names it resumes one that did not, and a folder says what it was made in."""
    given: dict[str, Any] = {"calibration": [str(text_file)], "samples": 2, "length": 32}
    source = family_folder("mixtral")
    for out, dtype in (("plain", "auto"), ("named", "float32"), ("typed", torch.float32)):
        trimoe.compress(source, DROP, tmp_path / out, dtype=dtype, **given)
    monkeypatch.setattr(precision, "_has_bfloat16", lambda device: True)
    trimoe.compress(source, DROP, tmp_path / "half", **given)
    record = {out.name: json.loads((out / "trimoe.json").read_text())["inputs"]["dtype"] for out in tmp_path.iterdir()}
    assert record == {"plain": "float32", "named": "float32", "typed": "float32", "half": "bfloat16"}
    stats = trimoe.gather_statistics(source, tmp_path / "stats", **given)
    assert stats.about["dtype"] == "bfloat16"
    report = {
        dtype: trimoe.evaluate(source, text=[f"x={text_file}"], length=32, tokens=64, dtype=dtype)
        for dtype in ("auto", "bfloat16", "float32")
    }
    assert report["auto"]["texts"] == report["bfloat16"]["texts"] != report["float32"]["texts"]


def test_a_plan_counts_what_will_be_computed_in(family_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trimoe.plan(str(family_folder("mixtral")), DROP, device="cuda", dtype="float32").device_split
    half = trimoe.plan(str(family_folder("mixtral")), DROP, device="cuda").device_split
    assert half == trimoe.plan(str(family_folder("mixtral")), DROP, device="cuda", dtype="bfloat16").device_split
    assert half["statistics"] < whole["statistics"]
