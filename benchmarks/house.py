"""Measure how a checkout is built: sizes, rooms, levels of imports, long functions and lines. It works on any checkout of trimoe.

python benchmarks/house.py                        # this checkout
python benchmarks/house.py ../other ../third      # side by side
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from alternate import table

METHODS = ("ExpertDrop", "LayerDrop", "BlockDrop", "LowRank", "Quantize", "WeightPrune")
MANY = 6  # arguments of a function
LONG = 110  # characters of a line


def sources(root: Path) -> dict[str, Path]:
    """Return the files of the product by their dotted names."""
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted((root / "trimoe").rglob("*.py"))}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def room_of(name: str) -> str:
    """The folder in trimoe/ that a module lies in, or the module itself where it lies in none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def arrows(files: dict[str, Path]) -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    known, found = {room_of(name) for name in files}, defaultdict(set)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module == "trimoe":
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimoe."):
                named = [(node.module or "").split(".")[1]]
            found[room_of(name)] |= {one for one in named if one in known and one != room_of(name)}
    return found


def levels(found: dict[str, set[str]]) -> int | str:
    """Return the length of the longest way down, or say that there is a circle."""
    depth: dict[str, int] = {}

    def below(room: str, way: tuple[str, ...]) -> int:
        if room in way:
            raise RecursionError(" -> ".join((*way[way.index(room) :], room)))
        if room not in depth:
            depth[room] = 1 + max((below(other, (*way, room)) for other in found.get(room, ())), default=0)
        return depth[room]

    try:
        return max(below(room, ()) for room in list(found))
    except RecursionError as circle:
        return f"a circle: {circle}"


def measured(root: Path) -> dict[str, int | float | str]:
    files = sources(root)
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = [len(text.splitlines()) for text in texts.values()]
    every = [function for tree in trees.values() for function in functions(tree)]
    folders = Counter(path.parent for path in files.values() if path.name != "__init__.py")
    classes = Counter(node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef))
    outside = {name: text for name, text in texts.items() if not name.startswith("trimoe.methods")}
    asked = re.compile(rf"isinstance\([^()]*\b({'|'.join(METHODS)})\b")
    tests = list((root / "tests").rglob("*.py"))
    return {
        "files": len(files), "lines": sum(lines), "files in the largest folder": max(folders.values()),
        "median file, lines": statistics.median(lines), "largest file, lines": max(lines),
        "files over 300 lines": sum(count > 300 for count in lines),
        "median function, lines": statistics.median((one.end_lineno or one.lineno) - one.lineno + 1 for one in every),
        f"functions with more than {MANY} arguments": sum(arguments(one) > MANY for one in every),
        f"lines over {LONG} characters": sum(len(line) > LONG for text in texts.values() for line in text.splitlines()),
        "fmt: skip": sum(text.count("# fmt: skip") for text in texts.values()),
        "rooms": len(arrows(files)), "levels of imports between rooms": levels(arrows(files)),
        "classes that share a name": sum(count for count in classes.values() if count > 1),
        "isinstance of a method outside methods/": sum(len(asked.findall(text)) for text in outside.values()),
        "names of methods outside methods/": sum(len(re.findall(rf"\b({'|'.join(METHODS)})\b", text)) for text in outside.values()),
        "lines of tests": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tests),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, metavar="CHECKOUT", default=[Path(__file__).resolve().parents[1]])
    found = {str(root): measured(root) for root in parser.parse_args().roots}
    rows = next(iter(found.values()))
    print(table([{"": name, **{root: values[name] for root, values in found.items()}} for name in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
