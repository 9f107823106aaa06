"""What tests of reports share: which results are looked at, and what holds of every page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {"samples": 4, "length": 32}
RECIPES: dict[str, tuple[list[str], set[str]]] = {
    "expert-drop": ([], {"experts"}),
    "naee": ([], {"experts", "search"}),
    "moe-i2": (["steps.1.ratio=0.3"], {"experts", "search", "ranks"}),
    "low-rank": ([], {"ranks"}),
    "layer-drop": (["steps.0.ratio=0.34"], {"depth"}),
    "block-drop": (["steps.0.ratio=0.34"], {"depth"}),
    "slim-int4": (["steps.0.group=8"], {"numbers"}),
    "moe-pruner-2-4": ([], {"numbers"}),
    "layer-drop-full": (["steps.0.ratio=0.34", "recover.samples=8", "recover.length=32", "recover.steps=2"], {"depth", "recovery"}),
}


class Read(HTMLParser):
    """Every tag and its attributes, scripts and texts of a page; it must be well nested."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def checked(html: str) -> Read:
    """What holds of every page."""
    read = Read(html)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in read.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
        for name in ("aria-labelledby", "href"):
            if name in attributes:
                assert (attributes[name] or "").lstrip("#") in ids
    assert [dict(attributes).get("type") for attributes, _ in read.scripts] == ["application/json", None, None]
    policy = next(meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy") or ""
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "connect-src" not in policy
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert allowed == [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for _, code in read.scripts[1:]]
    specs = json.loads(read.scripts[0][1])["specs"]
    drawn = [attributes["data-chart"] for attributes in read.all("div") if "data-chart" in attributes]
    assert sorted(drawn) == sorted(specs)
    assert len(read.all("figure")) == len(read.all("details")) == len(drawn), "every chart has its table"
    assert "http" not in json.dumps(specs)
    assert len(read.all("h1")) == 1 and len(read.all("main")) == 1 and read.all("html")[0]["lang"] == "en"
    return read


def everything(folder: Path, tmp_path: Path) -> Path:
    """The folder's record with all that an evaluation and a benchmark can add."""
    out = tmp_path / "everything"
    shutil.copytree(folder, out)
    record = json.loads((out / "trimoe.json").read_text())
    for row in record["evaluation"]["texts"]:
        row |= {
            "resampled": "documents",
            "intervals": {"perplexity": [1.0, 2.0], "kl": [0.1, 0.2], "agreement": [0.5, 0.6], "against_perplexity": [1.0, 2.0]},
        }
    record["evaluation"]["tasks"] = [
        {"task": "piqa", "metric": "acc", "n": 10, "value": 0.5, "stderr": None, "against": {"value": 0.6, "stderr": 0.01},
         "difference": -0.1, "difference_stderr": 0.02},
        {"task": "rte", "metric": "acc", "n": 10, "value": 0.5, "stderr": 0.1},
    ]  # fmt: skip
    ways = {"greedy": {"loops": 0.5, "empty": 0.0, "distinct": 0.125}, "sampled": {"loops": 0.0, "empty": 0.0, "distinct": None}}
    written = {
        "loops": 0.25,
        "empty": 0.0,
        "distinct": 0.125,
        **ways,
        "samples": [{"prompt": "a", "greedy": "goes on", "sampled": "wanders"}],
    }
    record["evaluation"]["commands"] = {"texts": "trimoe eval THIS", "tasks": "trimoe eval THAT", "generation": "trimoe eval THIS"}
    record["evaluation"]["generation"] = {"prompts": 4, "prompt_tokens": 8, "new_tokens": 8, "model": written, "against": written}
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    model = dict.fromkeys(("prefill_tokens_s", "decode_tokens_s", "first_token_s"), spread)
    model |= {"load_s": 1.0, "resident_bytes": 10, "peak_bytes": 10, "disk_bytes": 10, "dtype": "float32"}
    record["bench"] = {
        "batch": 1, "prompt": 8, "generate": 8, "rounds": 2, "machine": "here", "device": "cpu", "threads": 1, "torch": "2", "models": [model, model],
        "ratio": {**model, "load_s": 1.0},
    }  # fmt: skip
    (out / "trimoe.json").write_text(json.dumps(record))
    return out
