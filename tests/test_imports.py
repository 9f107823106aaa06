"""Imports point one way, so that every part can be read without what stands on it."""

from __future__ import annotations

import ast
from pathlib import Path

import trimoe

ROOT = Path(trimoe.__file__).parent
MAKING = {"compress", "decide", "gather", "transform", "write", "stream", "observe"}  # what reads weights and makes results
SEEING = {"plan", "plan_table", "tables", "card", "report", "cli"}  # what people see
FORBIDDEN = {
    "methods": {"stream", "write", "compress", "gather", "decide", "transform", "cli"},
    "evaluate": {"compress", "decide", "gather", "transform", "write", "plan", "cli"},
    "skeleton": {"stream", "observe", "stats", "methods", "gather", "plan", "layout"},
    "stream": {"methods", "gather", "decide", "observe", "stats"},
    "stats": {"stream", "methods", "gather", "observe"},
    "subset": {"stream", "methods", "gather", "observe", "search"},
    "search": {"stream", "methods", "gather", "observe", "stats"},
    "scores": {"stream", "methods", "gather", "observe"},
    "plan": {"stream", "gather", "write", "decide", "transform"},
    "paper": {"stream", "gather", "write", "decide", "transform", "plan"},
    "linears": {"stream", "gather", "write", "decide", "layout"},
    "entry": {"stream", "gather", "skeleton", "layout"},
    "sparsity": {"stream", "methods", "gather", "observe", "skeleton"},
    "recover": {"compress", "decide", "gather", "transform", "plan", "cli", "recipe", "layout"},
    "report": {"compress", "decide", "gather", "transform", "stream", "methods", "skeleton", "cli", "standings", "sweep", "alternatives"},
    "traffic": {"stream", "methods", "gather", "compress"},
    "running": {"stream", "methods", "gather", "compress"},
    "benchmark": {"methods", "gather", "compress", "decide", "transform", "write"},
    "quantization": {"stream", "methods", "gather", "observe", "skeleton"},
    "packing": {"stream", "methods", "gather", "observe", "skeleton", "checkpoint"},
    "checkpoint": {"skeleton", "stream", "methods", "hf"},
    "site": {"skeleton", "checkpoint", "layout", "methods", "hf"} | MAKING,
    "costs": MAKING | SEEING | {"work", "timing", "engines"},
    "engines": MAKING | SEEING | {"costs", "work", "timing", "stats"},
    "advice": MAKING | SEEING | {"costs", "layout", "stats"},
    "memory": MAKING | SEEING | {"layout", "stats", "costs", "variants"},
    "disk": MAKING | SEEING | {"layout", "stats", "costs"},
    "work": MAKING | SEEING | {"machine", "timing", "variants"},
    "machine": MAKING | SEEING | {"work", "timing", "recipe", "skeleton", "methods"},  # knows nothing of models
    "timing": (MAKING - {"stream"}) | SEEING,  # stream says which devices can be used
    "known": MAKING | SEEING | {"costs", "layout", "timing"},
    "stability": MAKING | SEEING | {"layout", "decide", "recorded"},
    "recorded": MAKING | SEEING,
    "inspection": (MAKING | SEEING | {"recipe", "timing"}) - {"plan", "plan_table"},
    "plan_table": MAKING | (SEEING - {"plan_table"}) | {"skeleton", "methods", "recipe", "layout"},  # draws JSON alone
    "progress": MAKING | SEEING | {"skeleton", "recipe", "methods"},
    "words": {path.stem for path in ROOT.iterdir()} - {"words"},
    "alternatives": MAKING | SEEING | {"skeleton", "sweep", "standings"},
    "standings": (MAKING - {"write"}) | {"sweep", "plan", "cli", "skeleton", "methods"},
    "sweep": {"cli", "report", "recover", "transform", "plan_table"},
}


def imported(path: Path) -> set[str]:
    """Names of trimoe's own modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trimoe":
            inner = (node.module or "").split(".")[1:]
            found |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trimoe.")}
    return found


def test_imports_point_one_way() -> None:
    for part, forbidden in FORBIDDEN.items():
        files = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else sorted((ROOT / part).glob("*.py"))
        assert files, part
        for path in files:
            assert not (wrong := imported(path) & forbidden), f"{path.name} imports {sorted(wrong)}"


def test_methods_do_not_import_each_other() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        if path.name not in ("__init__.py", "method.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
            assert {name for name in names if name.startswith("trimoe.methods.")} <= {"trimoe.methods.method"}, path.name


def test_nothing_of_the_product_reaches_outside_itself() -> None:
    for path in ROOT.rglob("*.py"):
        assert "../shared" not in path.read_text(encoding="utf-8"), path
