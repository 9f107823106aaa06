"""Damage for the files of a model: JSON changed in what it says, bytes changed in any file, headers of shards with a wrong length."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Iterator
from typing import Any

import yaml

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 1000, 4097, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 64, 10**9, 10**18, 10**300, -(10**9), 0.0,
    0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf"), "", "a", "8", "float16", "bfloat16", "silu", "none", "../x", "/etc/passwd", "org/x",
    "\ud800", "\x00", "\x1b[2J", "x" * 5000, [], [0], [1, 2, 3], ["a"], [[]], [None] * 3, {}, {"a": 1}, {"": {}}, {"rope_type": "yarn"},
]  # fmt: skip
NAMES = ("", "a", "__metadata__", "num_experts", "layer_types", "\x1b[0m", "quantization_config", "moe_compression", "auto_map")
PIECES = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"0", b"-", b"9" * 5000, b"e9", b"\x00", b"\xff", b"\xed\xa0\x80", b"NaN", b"null", b"\\u",
]  # fmt: skip
RECIPES: tuple[dict[str, Any], ...] = (
    {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "importance", "search": {"genetic": {}}}}, {"low_rank": {"ratio": 0.3}}]},
    {"steps": [{"quantize": {"bits": 8, "group": 8}}], "target": "vllm", "calibration": {"samples": 4, "length": 32}},
    {"steps": [{"block_drop": {"count": 1}}], "recover": {"method": "router"}},
    {"steps": [{"layer_drop": {"ratio": 0.5}}, {"weight_prune": {"ratio": 0.5, "form": "bitmask"}}]},
)


def deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def changed(text: bytes | str, rng: random.Random) -> Any:
    """What a JSON text says, with one to three things in it changed."""
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value)) if isinstance(value, (dict, list)) else []
        if not found:
            return rng.choice(VALUES)
        box, key = rng.choice(found)
        how = rng.randrange(10)
        if how == 0:
            del box[key]
        elif how == 1:
            other, name = rng.choice(found)
            box[key] = _copy(other[name]) if (isinstance(other, dict) and name in other) else None
        elif how == 2 and isinstance(box, dict):
            box[rng.choice((*NAMES, str(key) + "x"))] = box.pop(key)
        elif how == 3 and isinstance(box[key], (int, float)) and abs(box[key]) < 1e12:
            box[key] = rng.choice((box[key] + 1, box[key] - 1, box[key] * 2, -box[key], float(box[key]), str(box[key]), [box[key]]))
        elif how == 4:
            box[key] = deep(rng.choice((2, 50, 400)))
        else:
            box[key] = _copy(rng.choice(VALUES))
    return value


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, (dict, list)) else value


def torn(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, cut away, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del out[at:]
        elif how == 2:
            del out[at : at + rng.randrange(64)]
        elif how == 3:
            out[at:at] = rng.choice(PIECES)
        else:
            out[at:at] = out[at : at + rng.randrange(200)]
    return bytes(out)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, changed in what it says or in its bytes."""
    if rng.random() < 0.3:
        return torn(data, rng)
    return b"[" * 100_000 if rng.random() < 0.002 else json.dumps(changed(data, rng)).encode()


def consistent(text: bytes, rng: random.Random) -> bytes:
    """A header that fits its file and not its model: shapes and dtypes of the same bytes, entries under each other's names."""
    header = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        first, second = rng.sample([name for name in header if name != "__metadata__"], 2)
        entry, shape = header[first], header[first]["shape"]
        how = rng.randrange(4)
        if how == 0:
            entry["dtype"] = rng.choice(("F16", "BF16", "I16"))
        elif how == 1:
            header[first], header[second] = header[second], entry
        elif how == 2:
            entry["dtype"], entry["shape"] = rng.choice(("U8", "I8", "F8_E4M3", "F8_E5M2", "BOOL")), [*shape[:-1], 2 * shape[-1]]
        else:
            count = math.prod(shape)
            entry["shape"] = rng.choice((shape[::-1], [count], [1, *shape], [*shape, 1], [2, count // 2], [0, *shape, 0], [count, 1, 1]))
    return json.dumps(header).encode()


def shard(data: bytes, rng: random.Random) -> bytes:
    """A shard with another header, the length before it right or wrong."""
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length]
    header = consistent(text, rng) if rng.random() < 0.25 else mutated(text, rng)
    said = rng.choice((0, 1, 1 << 20, 1 << 40, (1 << 64) - 1)) if rng.random() < 0.05 else len(header)
    return struct.pack("<Q", said) + header + data[8 + length :]


def recipe(rng: random.Random) -> bytes:
    """A recipe's text."""
    value = changed(json.dumps(rng.choice(RECIPES)), rng)
    try:
        text = yaml.safe_dump(value).encode()
    except RecursionError:  # the deep ones; JSON is YAML too
        text = json.dumps(value).encode()
    return torn(text, rng) if rng.random() < 0.3 else text
