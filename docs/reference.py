"""The reference pages, from the code: fields of recipes from the dataclasses and their docstrings, verbs from typer, Python from __all__.

As a program (`python docs/reference.py`) it rewrites what stands between the markers `<!-- reference: KIND NAME -->` and `<!-- end -->` in
docs/*.md, so that the pages can be read without a build; as a hook of mkdocs it does the same to the pages that are built, and puts
CHANGELOG.md, LOG.md, SECURITY.md and log/ among them, with the CSV files of log/ shown as tables. `cell` is how the figure and tests
read a number of the log. tests/test_docs.py holds that the pages are up to date and that no field is undocumented.
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the checkout's trimoe, whatever is installed; mkdocs takes the path away again after the import

import trimoe  # noqa: E402

MARKED = re.compile(r"(?P<start><!-- reference: (?P<kind>\w+) (?P<name>[\w.-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
FIELD = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*) +(?P<text>\S.*)$")
LOG = HERE.parent / "log"
BORROWED = ("CHANGELOG.md", "LOG.md", "SECURITY.md")  # pages that lie in the root
SECTIONS = {"CalibrationSpec": "calibration"}  # where a class is described under another heading than its own name
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


# ---- fields of a dataclass


def classes() -> dict[str, Any]:
    """Every dataclass that a recipe is made of, by its name."""
    from trimoe.methods import METHODS
    from trimoe.methods.expert_drop.options import SEARCHES, ReceptiveField
    from trimoe.recipe.recipe import Recipe
    from trimoe.recipe.recover import Recover
    from trimoe.text.spec import CalibrationSpec

    return {kind.__name__: kind for kind in (Recipe, CalibrationSpec, Recover, *METHODS.values(), *SEARCHES.values(), ReceptiveField)}


def meanings(kind: Any) -> dict[str, str]:
    """What the class's docstring says of each field: columns `name, name   text`, continued on lines that are further in. Cleaned
    docstrings start at column 0, so the columns are looked for in the raw one."""
    known = {entry.name for entry in dataclasses.fields(kind)}
    found: dict[str, str] = {}
    current: list[str] = []
    for line in (kind.__doc__ or "").splitlines()[1:]:
        match = FIELD.match(line)
        if match and set(match["names"].split(", ")) <= known:
            current = match["names"].split(", ")
            found |= dict.fromkeys(current, match["text"])
        elif current and line.startswith(" " * 6):
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = []
    return found


def written(annotation: Any, bounds: tuple[Any, ...] = ()) -> tuple[str, str]:
    """A type as people write it in YAML, and the range that it allows."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return written(args[0], (*bounds, *args[1:]))
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in args), ""
    if origin in (Union, UnionType):
        parts = [written(part, bounds) for part in args if part is not type(None)]
        kinds = [kind for kind, _ in parts] + (["null"] if type(None) in args else [])
        return " \\| ".join(dict.fromkeys(kinds)), next((allowed for _, allowed in parts if allowed), "")
    if origin in (list, tuple):
        inner = "steps" if origin is tuple else written(args[0])[0]
        return f"list of {inner}", ""
    if dataclasses.is_dataclass(annotation):
        name = annotation.__name__
        return f"[{SECTIONS.get(name, _slug(name))}](#{SECTIONS.get(name, _slug(name))})", ""
    names = {"float": "number", "int": "integer", "str": "text", "bool": "`true` \\| `false`"}
    return names[annotation.__name__], _range(bounds)


def _range(bounds: tuple[Any, ...]) -> str:
    """The limits in the metadata: annotated_types' objects, bare or inside a pydantic field."""
    single = [entry for bound in bounds for entry in getattr(bound, "metadata", [bound])]
    said = [word.format(f"{getattr(entry, key):,g}") for entry in single for key, word in BOUNDS.items() if hasattr(entry, key)]
    return ", ".join(said)


def _slug(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _default(entry: dataclasses.Field[Any]) -> str:
    default = entry.default
    if hasattr(default, "default"):  # pydantic's own field object
        default = default.default
    if entry.default_factory is not dataclasses.MISSING:
        return "its defaults"
    if default is dataclasses.MISSING or type(default).__name__ == "PydanticUndefinedType":
        return "**required**"
    return f"`{'null' if default is None else str(default).lower() if isinstance(default, bool) else default}`"


def fields(name: str) -> str:
    """The table of a dataclass's fields."""
    kind = classes()[name]
    from typing import get_type_hints

    hints, said = get_type_hints(kind, include_extras=True), meanings(kind)
    if not dataclasses.fields(kind):
        return "It has no fields.\n"
    rows = ["| field | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for entry in dataclasses.fields(kind):
        typed, allowed = written(hints[entry.name])
        meaning = said[entry.name].replace("|", "\\|")
        rows.append(f"| `{entry.name}` | {_default(entry)} | {typed}{', ' if allowed else ''}{allowed} | {meaning} |")
    return "\n".join(rows) + "\n"


# ---- verbs


def verbs() -> dict[str, Any]:
    from typer.main import get_command

    from trimoe.cli import app

    return dict(get_command(app).commands)  # type: ignore[attr-defined]


def verb(name: str) -> str:
    """A verb: what it does, how it is called, and its options."""
    command = verbs()[name]
    options = [entry for entry in command.params if entry.param_type_name == "option" and entry.name != "help"]
    arguments = [entry for entry in command.params if entry.param_type_name == "argument"]
    call = " ".join(entry.name.upper() if entry.required else f"[{entry.name.upper()}]" for entry in arguments)
    out = [inspect.cleandoc(command.help), "", "```text", f"trimoe {name} {call} [OPTIONS]".replace("  ", " "), "```", ""]
    rows = [f"| `{entry.name.upper()}` | {'**required**' if entry.required else ''} | {_cell(entry.help)} |" for entry in arguments]
    for entry in options:
        flags = ", ".join(f"`{flag}`" for flag in entry.opts)
        many = " (repeatable)" if entry.multiple and "repeatable" not in (entry.help or "") else ""
        rows.append(f"| {flags} | {_option_default(entry)} | {_cell(entry.help)}{many} |")
    return "\n".join([*out, "| argument or option | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"


def _cell(text: str | None) -> str:
    assert text, "an option without a help text"
    return text.replace("|", "\\|")


def _option_default(entry: Any) -> str:
    if entry.required:
        return "**required**"
    if entry.is_flag or entry.default in (None, [], ()):
        return ""
    return f"`{entry.default}`"


def all_verbs(_: str) -> str:
    """Every verb under a heading of its own."""
    return "\n".join(f"## {name}\n\n{verb(name)}" for name in verbs())


def all_recipes(_: str) -> str:
    """Name, first line and steps of every built-in recipe."""
    from trimoe.recipe import recipe

    rows = []
    for name in recipe.names():
        parsed = recipe.load(name)
        steps = ", ".join(f"[{step.name}](#{step.name})" for step in parsed.steps) + (", [recover](#recover)" if parsed.recover else "")
        lines = recipe.text_of(name).partition("steps:")[0].splitlines()
        said = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        rows.append(f"| `{name}` | {steps} | {said} |")
    return "\n".join(["| recipe | steps | what it does |", "| --- | --- | --- |", *rows]) + "\n"


# ---- Python


def all_names(_: str) -> str:
    """Everything public under a heading of its own: functions, then classes."""
    public = sorted(
        (name for name in trimoe.__all__ if not name.startswith("_")), key=lambda name: (inspect.isclass(getattr(trimoe, name)), name)
    )
    return "\n".join(f"## trimoe.{name}\n\n{python(name)}" for name in public)


def python(name: str) -> str:
    """A name of `trimoe.__all__`: its signature and docstring."""
    thing = getattr(trimoe, name)
    if inspect.isclass(thing):
        doc = inspect.cleandoc(thing.__doc__ or "")
        public = [entry.name for entry in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
        return doc + (f"\n\nFields: {', '.join(f'`{field}`' for field in public)}.\n" if public else "\n")
    lines = ["    *," if at == "*" else f"    {at}," for at in _parameters(inspect.signature(thing))]
    returns = str(inspect.signature(thing).return_annotation).strip("'")
    head = f"trimoe.{name}(" + ("\n" + "\n".join(lines) + "\n" if lines else "") + f") -> {returns}"
    return f"```python\n{head}\n```\n\n```text\n{inspect.cleandoc(thing.__doc__ or '')}\n```\n"


def _parameters(signature: inspect.Signature) -> list[str]:
    """One parameter a line, as the source says it; the progress reporter's object is left out."""
    out: list[str] = []
    for entry in signature.parameters.values():
        if entry.name == "reporter":
            continue
        if entry.kind is entry.KEYWORD_ONLY and "*" not in out:
            out.append("*")
        prefix = "**" if entry.kind is entry.VAR_KEYWORD else ""
        default = "" if entry.default is entry.empty else f" = {entry.default!r}"
        out.append(f"{prefix}{entry.name}: {str(entry.annotation).strip(chr(39))}{default}")
    return out


# ---- pages

KINDS = {"fields": fields, "verb": verb, "verbs": all_verbs, "python": python, "names": all_names, "recipes": all_recipes}


def filled(page: str) -> str:
    """The page with what stands between its markers made anew."""
    return MARKED.sub(lambda match: f"{match['start']}\n{KINDS[match['kind']](match['name'])}\n{match['end']}", page)


def pages() -> list[Path]:
    return sorted(path for path in HERE.rglob("*.md") if MARKED.search(path.read_text(encoding="utf-8")))


# ---- the log's tables


def rows(table: str) -> list[dict[str, str]]:
    """The rows of a CSV file of log/, each a mapping from column to cell."""
    with (LOG / table).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cell(reference: str) -> str:
    """The cell that `TABLE.csv | ROW | COLUMN` names, where ROW is the text of the row's first column."""
    table, name, column = reference.split(" | ")
    (row,) = [row for row in rows(table) if next(iter(row.values())) == name]
    return row[column]


def _shown(link: re.Match[str]) -> str:
    """The table of a CSV file, below the link to it."""
    named = rows(link["table"])
    lines = [list(named[0]), ["---"] * len(named[0]), *(list(row.values()) for row in named)]
    return "\n".join([link[0], "", *(f"| {' | '.join(line)} |" for line in lines)])


# ---- hooks of mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Take pages and tables from the root of the repository."""
    from mkdocs.structure.files import File

    root = HERE.parent
    taken = {name.lower(): root / name for name in BORROWED}
    taken |= {str(path.relative_to(root)): path for path in sorted(LOG.rglob("*.*"))}
    for target, source in taken.items():
        files.append(File.generated(config, target, content=source.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the markers, show the log's tables, and turn links to log/ and LOG.md into those of the site."""
    outward = r"(?<=\]\()(?P<up>(\.\./)*)\.\./(?P<page>log/|LOG\.md)"
    page = re.sub(outward, lambda link: link["up"] + link["page"].lower(), filled(markdown))
    return re.sub(r"^\[(?P<table>[\w/-]+\.csv)\]\((?P=table)\)$", _shown, page, flags=re.MULTILINE)


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(HERE.parent))
