"""What lies in a model's folder beside its weights and is carried over unchanged: tokenizer, chat templates, processors, licences, code that
a tokenizer names (kept, never run). Not carried: weights in any form, what training left, and what trimoe itself writes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ort", ".tflite", ".npz",
    ".npy", ".pkl", ".pickle", ".distcp", ".ot", ".mlmodel", ".engine", ".xml.bin", ".llamafile", ".part",
)  # fmt: skip
INDICES = re.compile(r"\.index(\.[\w-]+)*\.json$")  # model.safetensors.index.json, of variants and of other formats
CARD = "README.md"  # read for the licence, written anew
RECORD = "trimoe.json"  # opened by output/record.py alone
# Written for every result, or by what trimoe does with one; and what trainers leave.
OWN = frozenset({"config.json", RECORD, CARD, "trimoe.log", "report.html", "modeling_trimoe.py", "adapter_config.json"})
TRAINING = frozenset({"trainer_state.json", "zero_to_fp32.py", "latest"})


def is_weights(name: str) -> bool:
    """Whether a file holds weights or says which files do."""
    return name.lower().endswith(WEIGHTS) or INDICES.search(name.lower()) is not None


def names_in(folder: Path) -> list[str]:
    """All files in a folder by their path from it, with / between; hidden ones, caches and folders that are links are passed over."""
    found: list[str] = []
    for place, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
        here = Path(place)
        found += [(here / name).relative_to(folder).as_posix() for name in files if not name.startswith(".") and (here / name).is_file()]
    return sorted(found)


def carried(names: Iterable[str]) -> list[str]:
    """Of files by their path, those that go into a result. A folder with weights in it is another form of the model, or a state of its
    training: nothing of it goes along."""
    names = [name for name in names if not name.startswith(".") and "/." not in name and "__pycache__/" not in name]
    others = set(_other_forms(names))
    return sorted(
        name for name in names
        if not is_weights(name) and name not in OWN | TRAINING and name.partition("/")[0] not in others
    )  # fmt: skip


def left_out(names: Iterable[str], weights: Iterable[str]) -> list[str]:
    """Of files by their path, weights that are not the model's own (`weights`), folder by folder where a folder has some."""
    names, own = list(names), set(weights)
    single = [name for name in names if "/" not in name and name not in own and name.lower().endswith(WEIGHTS)]
    return sorted({*single, *(f"{name}/" for name in _other_forms(names))})


def _other_forms(names: Iterable[str]) -> list[str]:
    return [name.partition("/")[0] for name in names if "/" in name and is_weights(name)]
