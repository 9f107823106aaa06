"""Folders of trimoe/ are stages of the job, and imports go down one list of levels, so that every room can be read without those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import trimoe

ROOT = Path(trimoe.__file__).parent
LEVELS = (  # lowest first; a room may import rooms of the lines above its own, and its own files
    {"errors", "modeling_trimoe", "version"},
    {"auto_classes"},
    {"progress", "show", "team"},
    {"checkpoint"},
    {"model", "text"},
    {"skeleton", "walk"},
    {"calibration", "run"},
    {"journal"},
    {"methods"},
    {"recipe"},
    {"output"},
    {"plan", "report"},
    {"evaluate"},
    {"recover"},
    {"compress"},
    {"sweep"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
MOST_FILES = 15  # of a room


def room_of(path: Path) -> str:
    inside = path.relative_to(ROOT)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported(path: Path) -> set[str]:
    """Return the rooms that a file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "trimoe":
            found |= {
                alias.name if (ROOT / alias.name).is_dir() or (ROOT / f"{alias.name}.py").is_file() else "__init__" for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimoe."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] if "." in alias.name else "__init__"
                for alias in node.names
                if alias.name.split(".")[0] == "trimoe"
            }
    return found


def test_imports_go_down_the_levels() -> None:
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    for path in sorted(ROOT.rglob("*.py")):
        room = room_of(path)
        wrong = {other for other in imported(path) - {room} if level[other] >= level[room]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_no_room_is_crowded() -> None:
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        names = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(names) <= MOST_FILES, folder


def test_no_two_classes_have_one_name() -> None:
    seen: dict[str, Path] = {}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                assert node.name not in seen, f"{node.name} is in {path.relative_to(ROOT)} and {seen[node.name].relative_to(ROOT)}"
                seen[node.name] = path


def test_only_the_record_opens_its_file() -> None:
    """The file's name is in one list of names and in the constant RECORD, which others take to compare names with."""
    written, taken = set(), set()
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            written |= {name} if isinstance(node, ast.Constant) and node.value == "trimoe.json" else set()
            taken |= {name} if isinstance(node, ast.ImportFrom) and "RECORD" in {alias.name for alias in node.names} else set()
    assert written == {"checkpoint/side_files.py", "cli/options.py"}
    assert taken == {"output/record.py", "cli/options.py", "recover/run.py", "sweep/sweep.py"}


def test_nothing_of_the_product_reaches_outside_itself() -> None:
    for path in ROOT.rglob("*.py"):
        assert "../shared" not in path.read_text(encoding="utf-8"), path
