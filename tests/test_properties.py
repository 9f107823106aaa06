"""Whatever a file holds, it is read or refused by one UserError: properties over generated headers, configurations, recipes and texts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from trimoe.checkpoint.headers import DTYPES, header_bytes, read_header
from trimoe.errors import UserError
from trimoe.model.skeleton import Skeleton
from trimoe.plan import inspection
from trimoe.plan.plan import plan
from trimoe.recipe import recipe
from trimoe.text import samples

# The folders of fixtures serve every example of a test: each example writes its own file anew.
FAST = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FEW = settings(FAST, max_examples=settings.default.max_examples // 3)

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4096, 1 << 31, 1 << 62, 1 << 64, 10**30]) | st.integers(-4, 40)
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12
)
ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from([*DTYPES, "U3"]) | LEAVES, "shape": st.lists(NUMBERS, max_size=4) | JSON,
                  "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON},
)  # fmt: skip
HEADERS = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)
TENSORS = st.lists(
    st.tuples(st.sampled_from(sorted({*DTYPES} - {"F8_E8M0"})), st.lists(st.integers(0, 5), max_size=3).map(tuple)), max_size=5
)  # fmt: skip
Family = Callable[[str], Path]


def one_sentence(error: UserError) -> None:
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text and len(text) < 2000


def allowed(action: Callable[[], Any]) -> Any:
    """The action's result, None where it refuses; any other exception is a failure."""
    try:
        return action()
    except UserError as error:
        one_sentence(error)
        return None


# ---- headers


def shard(path: Path, text: bytes, tail: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + tail)
    return path


@FAST
@given(header=HEADERS | JSON, tail=st.binary(max_size=16), length=st.none() | st.integers(0, 1 << 64 - 1))
def test_any_header_is_read_or_refused(header: Any, tail: bytes, length: int | None, tmp_path: Path) -> None:
    path = shard(tmp_path / "x.safetensors", json.dumps(header).encode(), tail, length)
    found = allowed(lambda: read_header(path))
    if found is not None:
        assert all(8 <= info.start <= info.end <= path.stat().st_size for info in found.values())


@FAST
@given(data=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    allowed(lambda: read_header(path))


@FAST
@given(tensors=TENSORS, cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_headers_come_back_as_written_and_never_shorter(
    tensors: list[tuple[str, tuple[int, ...]]], cut: int, flip: int, tmp_path: Path
) -> None:
    entries = [(f"t{number}", dtype, shape) for number, (dtype, shape) in enumerate(tensors)]
    head = header_bytes(entries)
    sizes = [torch.empty(shape, dtype=DTYPES[dtype]).nbytes for _, dtype, shape in entries]
    path = tmp_path / "x.safetensors"
    whole = head + bytes(sum(sizes))
    path.write_bytes(whole)
    found = read_header(path)
    assert [(key, info.dtype, info.shape, info.nbytes) for key, info in found.items()] == [
        (*entry, size) for entry, size in zip(entries, sizes, strict=True)
    ]
    assert load(whole).keys() == found.keys()
    damaged = bytearray(whole[: max(0, len(whole) - cut)])
    if flip < len(damaged):
        damaged[flip] ^= 1
    path.write_bytes(damaged)
    again = allowed(lambda: read_header(path))
    if again is not None:  # a flipped bit in a name, a dtype of the same size or the numbers themselves
        assert len(damaged) == len(whole) and sum(info.nbytes for info in again.values()) == sum(sizes)


# ---- configurations


@pytest.fixture(scope="module")
def small(family_folder: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixtral by links; config.json is its own."""
    folder = tmp_path_factory.mktemp("properties")
    for path in family_folder("mixtral").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@FEW
@given(data=st.data(), value=JSON | NUMBERS)
def test_any_configuration_is_planned_or_refused(data: st.DataObject, value: Any, small: Path, family_folder: Family) -> None:
    config = json.loads((family_folder("mixtral") / "config.json").read_text())
    field = data.draw(st.sampled_from([*sorted(config), "moe_compression", "quantization_config", "layer_types", "auto_map"]))
    (small / "config.json").write_text(json.dumps({**config, field: value}))
    about = allowed(lambda: inspection.inspect(str(small)))
    if about is not None:
        inspection.table(about).encode()
    allowed(lambda: str(plan(str(small), "moe-i2")))


# ---- recipes


@pytest.fixture(scope="module")
def skeleton(family_folder: Family) -> Skeleton:
    return Skeleton.of(str(family_folder("mixtral")))


NAMES = st.sampled_from(["expert_drop", "layer_drop", "block_drop", "low_rank", "weight_prune", "quantize", "other"])
FIELDS = st.sampled_from(["ratio", "count", "counts", "search", "score", "rank", "bits", "group", "threshold", "form", "x"])
STEPS = st.lists(NAMES | st.dictionaries(NAMES, JSON | st.dictionaries(FIELDS, JSON, max_size=3), max_size=2), max_size=3)
PARTS = st.sampled_from(["calibration", "target", "recover", "x"])
RECIPES = st.tuples(STEPS | JSON, st.dictionaries(PARTS, JSON, max_size=2)).map(lambda both: {"steps": both[0], **both[1]})


@FAST
@given(body=RECIPES | st.dictionaries(st.text(max_size=4), JSON, max_size=3))
def test_any_recipe_is_planned_or_refused(body: dict[str, Any], skeleton: Skeleton, tmp_path: Path) -> None:
    allowed(lambda: plan(skeleton, body))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(body))
    allowed(lambda: recipe.load(path))


@FAST
@given(text=st.text(max_size=60) | st.text("{}[]:-&*!|>\"'\n a0#%@`?,", max_size=60))
def test_any_yaml_is_a_recipe_or_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    allowed(lambda: recipe.load(path))
    allowed(lambda: recipe.load("moe-i2", [text]))
    allowed(lambda: recipe.load("moe-i2", [f"steps.0.ratio={text}"]))


@FAST
@given(field=st.sampled_from(["ratio", "counts", "search"]), value=JSON)
def test_what_a_recipe_says_of_itself_can_be_read_again(field: str, value: Any) -> None:
    made = allowed(lambda: recipe.load({"steps": [{"expert_drop": {"ratio": 0.25, field: value}}]}))
    if made is not None:
        assert recipe.load(yaml.safe_load(yaml.safe_dump(made.to_json()))) == made


# ---- texts


@FAST
@given(
    lines=st.lists(
        st.binary(max_size=30) | JSON.map(lambda v: json.dumps(v).encode()) | JSON.map(lambda v: json.dumps({"text": v}).encode()),
        max_size=4,
    )
)
def test_any_text_is_read_or_refused(lines: list[bytes], tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"\n".join(lines))
        found = allowed(lambda name=name: samples.read_text(str(tmp_path / name)))
        assert found is None or all(isinstance(document, str) for text in found for document in text.documents)
