"""The documentation says what the code is: no field, verb or name is missing, no number comes from nowhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from trimoe.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LOG = ROOT / "log"
QUOTING = [ROOT / "README.md", *sorted((DOCS / "methods").glob("*.md")), DOCS / "choose.md", DOCS / "faq.md", DOCS / "papers.md"]
NOT_MEASURED = {"0.5625"}  # a share that follows from the format


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_field_of_every_step_is_documented(reference: ModuleType) -> None:
    classes = reference.classes()
    assert set(METHODS.values()) <= set(classes.values())
    for kind in classes.values():
        said = reference.meanings(kind)
        assert [entry.name for entry in dataclasses.fields(kind) if not said.get(entry.name)] == [], f"the docstring of {kind.__name__}"
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for name, kind in classes.items():
        section = page.partition(f"<!-- reference: fields {name} -->")[2].partition("<!-- end -->")[0]
        assert [entry.name for entry in dataclasses.fields(kind) if f"| `{entry.name}` |" not in section] == [], (
            f"{name} in docs/recipes.md"
        )


def test_a_field_without_a_meaning_is_noticed(reference: ModuleType) -> None:
    @dataclasses.dataclass
    class Half:
        """One field of two.

        said   is here, and
               goes on; also `unsaid` (not in a column)
        """

        said: int = 0
        unsaid: int = 0

    Half.__doc__ = re.sub(r"(?m)^ {4}", "", Half.__doc__ or "")  # as far in as a class at the top of a file
    assert reference.meanings(Half) == {"said": "is here, and goes on; also `unsaid` (not in a column)"}


def test_the_reference_is_up_to_date(reference: ModuleType) -> None:
    pages = reference.pages()
    assert {path.name for path in pages} == {"cli.md", "python.md", "recipes.md"}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert reference.filled(text) == text, f"{page.name} is stale; run: python docs/reference.py"


def test_every_verb_and_option_is_in_the_reference(reference: ModuleType) -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, command in reference.verbs().items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert [
            flag for entry in command.params for flag in entry.opts if entry.param_type_name == "option" and f"`{flag}`" not in section
        ] in (
            [],
            ["--help"],
        ), name


def test_numbers_come_from_the_log() -> None:
    """Every number of four decimals that a page quotes stands in a page or a table of log/."""
    pages = [path.read_text(encoding="utf-8") for path in LOG.rglob("*.*")]
    log = {number for page in pages for number in re.findall(r"\d+\.\d{4}\b", page)}
    assert len(log) > 200
    for page in QUOTING:
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"```console\n.*?```", "", text, flags=re.DOTALL)  # docs/readme.py holds these
        quoted = set(re.findall(r"(?<![\d.])\d+\.\d{4}\b(?!\d)", text))
        assert quoted - log <= NOT_MEASURED, f"{page.name} quotes what the log does not say"


def numbers(cells: Iterable[str]) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", " ".join(cells)))


def test_rows_of_tables_are_rows_of_the_log(reference: ModuleType) -> None:
    """Below `<!-- log: TABLE.csv ... -->` all numbers of a row stand in one row of each table, or of some.

    Tables of the same columns are one for each model, so the row taken of them must be that of the same name.
    """
    found = 0
    for page in QUOTING:
        for names, shown in re.findall(r"<!-- log: (\S.*) -->\n\n((?:\|.*\n)+)", page.read_text(encoding="utf-8")):
            tables: dict[tuple[str, ...], dict[tuple[str, ...], set[str]]] = {}
            for row in (row for name in names.split() for row in reference.rows(name)):
                named = tuple(cell for cell in row.values() if not re.fullmatch(r"[-\d.]*", cell))
                tables.setdefault(tuple(row), {}).setdefault(named, set()).update(numbers(row.values()))
            for line in shown.splitlines()[2:]:
                _, first, *others, _ = line.split("|")
                left = [{*re.findall(r"\d+\.\d+", first), *numbers(others)}]
                for table in tables.values():
                    left += [rest - row for rest in left for row in table.values() if rest & row]
                assert set() in left, f"{page.name}: no row of {names} has the numbers of {line}"
                found += 1
    assert found > 60 and sum(page.read_text(encoding="utf-8").count("<!-- log: ") for page in QUOTING) == 8


def test_the_log_has_a_verdict_for_every_entry() -> None:
    """LOG.md lists the headings of all pages; every page begins with its newest entry and links its tables."""
    verdicts = (ROOT / "LOG.md").read_text(encoding="utf-8")
    listed = []
    for page in sorted(LOG.glob("*.md"), key=lambda page: verdicts.index(f"](log/{page.name})")):
        text = page.read_text(encoding="utf-8")
        entries = re.findall(r"(?m)^## (\d{4}-\d\d-\d\d · .+)$", text)
        assert entries and len(entries) == text.count("\n## "), page.name
        assert [entry[:10] for entry in entries] == sorted((entry[:10] for entry in entries), reverse=True), page.name
        tables = {str(path.relative_to(LOG)) for path in (LOG / page.stem).glob("*.csv")}
        assert tables == set(re.findall(r"\]\(([\w/-]+\.csv)\)", text)), page.name
        listed += entries
    assert re.findall(r"(?m)^- (.+)$", verdicts) == listed


def test_the_figure_is_drawn_from_the_log(reference: ModuleType) -> None:
    points = json.loads((DOCS / "figure.json").read_text(encoding="utf-8"))["points"]
    wanted = sorted((point["name"], *(float(reference.cell(point[axis])) for axis in ("bytes", "kl"))) for point in points)
    for drawing in ("figure.svg", "figure-dark.svg"):
        labels = re.findall(
            r'% of the original: ([\d.]+); [^"]*: ([\d.]+); method: [^";]+; name: ([^"]+)"', (DOCS / drawing).read_text("utf-8")
        )
        assert sorted((name, float(share), float(kl)) for share, kl, name in labels) == wanted, "run: python docs/figure.py"


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | {f"log/{path.name}" for path in LOG.glob("*.md")}
    assert named == written | {"changelog.md", "log.md", "security.md"}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*DOCS.rglob("*.md"), *LOG.glob("*.md"), *ROOT.glob("*.md")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    links = {(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+\.\w+)[^)]*\)", texts[page])}
    assert len(links) > 100
    assert {link for page, link in links if "://" not in link and not (page.parent / link).exists()} == set()


def test_links_from_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", text)
    assert links
    assert [link for pair in links for link in pair if link and not link.startswith("http") and not (ROOT / link).exists()] == []


def test_examples_are_shown_as_they_are() -> None:
    """Each is a page's snippet, written so that mkdocs finds it (a formatter of code blocks would take it for Python)."""
    text = (DOCS / "examples.md").read_text(encoding="utf-8")
    shown = set(re.findall(r'(?m)^--8<-- "(examples/[^"]+)"$', text))
    assert shown == {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert "--8 <" not in "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))


def test_recipes_in_the_pages_are_recipes() -> None:
    """Every `--set` that a page shows next to a recipe's name works on it; every YAML block that has steps loads."""
    from trimoe.recipe import recipe

    pages = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *DOCS.rglob("*.md")]]
    shown = [match for page in pages for match in re.findall(r"`([a-z0-9-]+)((?: --set [\w.]+=[\w.-]+)+)`", page)]
    assert len(shown) >= 4
    for name, changes in shown:
        recipe.load(name, re.findall(r"--set (\S+)", changes))
    blocks = [block for page in pages for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "steps:" in block]
    assert blocks
    for block in blocks:
        recipe.load(yaml.safe_load(block))


# Files that are nobody's here: of users, of other projects, placeholders, and a script of before that the log tells of.
ELSEWHERE = {"train.py", "zero_to_fp32.py", "trimoe/methods/NAME/NAME.py", "benchmarks/papers/PAPER.py", "benchmarks/cost_model.py",
             "utils/transformers_weight_conversion.py"}  # fmt: skip


def test_files_that_are_named_are_there() -> None:
    """Docstrings, comments, pages and the log name source files by the end of their path."""
    rooms = [ROOT / name for name in ("trimoe", "benchmarks", "docs", "log", "examples")]
    sources = {f"/{path.relative_to(ROOT)}" for room in [*rooms, ROOT / "tests"] for path in room.rglob("*.py")}
    pages = [path for room in rooms for kind in ("*.py", "*.md") for path in room.rglob(kind)] + [ROOT / "README.md", ROOT / "LOG.md"]
    for page in pages:
        named = set(re.findall(r"(?<![\w.*])([A-Za-z_][\w/]*\.py)\b", page.read_text(encoding="utf-8"))) - ELSEWHERE
        gone = {name for name in named if not any(source.endswith(f"/{name}") for source in sources)}
        assert not gone, f"{page.relative_to(ROOT)} names {sorted(gone)}"
