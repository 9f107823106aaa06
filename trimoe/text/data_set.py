"""Data sets by name, streamed: `name:CONFIG/SPLIT#COLUMN`, or `name[CONFIG](SPLIT):SAMPLES`, from the Hugging Face hub or a folder.

Rows come in an order drawn by the seed: the files of the set are shuffled, ten of them are read at once (a set of few parquet files by their
row groups), and rows go through a buffer of 1,000. So every part of a set of many files may be met; of a set that is one large file of JSON
lines, only its first rows are, in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimoe.errors import UserError, first_line, stop_if_told
from trimoe.text.documents import Document, document

BUFFER = 1000  # rows that are shuffled among each other
FEW_FILES = 8  # of a set, up to which their row groups are told apart
SHOWN = 20  # names in a sentence
SAVED = ("state.json", "dataset_dict.json")  # what datasets' save_to_disk leaves
FORM = re.compile(
    r"(?P<name>[^\[\]()#:,]+)(\[(?P<config>[^\[\]]+)\])?(\((?P<split>[^()]+)\))?(:(?P<place>(?!\d+$)[^#:,]+))?(#(?P<column>[^:,]+))?(:(?P<samples>\d+))?"
)
WRITTEN = "NAME:CONFIG/SPLIT#COLUMN or NAME[CONFIG](SPLIT):SAMPLES"


@dataclass(frozen=True)
class Named:
    """A data set's name taken apart. `samples`: how many are drawn from it, None for an equal share."""

    name: str
    config: str | None = None
    split: str | None = None
    column: str | None = None
    samples: int | None = None

    @classmethod
    def of(cls, written: str) -> Named | None:
        """None for what is not written as a data set's name is."""
        found = FORM.fullmatch(written.strip())
        if found is None:
            return None
        config, split = found["config"], found["split"]
        if found["place"] is not None:
            first, slash, last = found["place"].rpartition("/")
            if (slash and config is not None) or split is not None or not last or (slash and not first):
                return None
            config, split = (first if slash else config), last
        samples = None if found["samples"] is None else int(found["samples"])
        return None if samples == 0 else cls(found["name"].strip(), config, split, found["column"], samples)

    @property
    def folder(self) -> Path | None:
        """Where it lies, if it is a folder of this machine."""
        path = Path(self.name).expanduser()
        return path if path.is_dir() else None

    @property
    def on_hub(self) -> bool:
        return self.folder is None and self.name.count("/") == 1 and not self.name.startswith((".", "/", "~"))


def several(source: str) -> list[str]:
    """The data sets of one argument, with a comma between; a single one, or anything else, as it is."""
    parts = [part.strip() for part in source.split(",")]
    found = [Named.of(part.rpartition("=")[2]) for part in parts]
    whole = (
        len(parts) > 1 and not Path(source).exists() and all(one is not None and (one.on_hub or one.folder is not None) for one in found)
    )
    return parts if whole else [source]


def documents(named: Named, purpose: str, characters: int, seed: int) -> list[Document]:
    """Rows in the order that the seed draws, until they hold so many characters. `purpose` "eval" takes the test part where none is named."""
    found: list[Document] = []
    held = 0
    for one in _documents(named, purpose, seed):
        found.append(one)
        held += len(one)
        if held >= characters:
            break
    return found


def _documents(named: Named, purpose: str, seed: int) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"There is no file {named.name!r}; to read it as a dataset id, install trimoe[data] (it brings datasets)."
        ) from None
    place = str(named.folder) if named.folder is not None else named.name
    try:
        rows = _rows(datasets, named, place, purpose)
        if rows.num_shards < FEW_FILES and hasattr(rows, "reshard"):
            rows = rows.reshard()
        for row in rows.shuffle(seed=seed, buffer_size=BUFFER):
            where = f"A row of the data set {named.name!r}"
            if named.column is not None and named.column not in row:
                raise UserError(f"The data set {named.name!r} has no column {named.column!r}; it has: {_some(list(row))}.")
            if (named.column and not row[named.column]) or ("text" in row and not row["text"] and named.column is None):
                continue  # an empty row
            yield document(row, named.column, where)
    except UserError:
        raise
    except Exception as error:  # datasets raises anything from OSError to its own types
        stop_if_told(error)
        raise UserError(_why(datasets, named, place, error)) from None


def _rows(datasets: Any, named: Named, place: str, purpose: str) -> Any:
    """The rows of the part that is asked for, as a stream."""
    if named.folder is not None and any((named.folder / name).is_file() for name in SAVED):
        saved = datasets.load_from_disk(place)
        splits = dict(saved) if hasattr(saved, "keys") else {named.split or "train": saved}
        part = named.split or _default(list(splits), purpose)
        if part not in splits:
            raise UserError(f"The data set {named.name!r} has no split {part!r}; it has: {_some(list(splits))}.")
        return splits[part].to_iterable_dataset(num_shards=min(FEW_FILES, max(1, len(splits[part]))))
    split = named.split
    if split is None and purpose == "eval":
        split = _default(datasets.get_dataset_split_names(place, named.config), purpose)
    return datasets.load_dataset(place, named.config, split=split or "train", streaming=True)


def _default(splits: list[str], purpose: str) -> str:
    """The part to calibrate on, or to evaluate on, where none is named."""
    wanted = ("test", "validation", "train") if purpose == "eval" else ("train",)
    return next((name for name in wanted if name in splits), splits[0] if len(splits) == 1 else wanted[-1])


def _why(datasets: Any, named: Named, place: str, error: Exception) -> str:
    """What is wrong with the name, as far as the set itself says."""
    if named.folder is None and isinstance(error, OSError):  # it is not there, or cannot be reached: asking again takes as long again
        return f"There is no file {named.name!r}, and the dataset of that name could not be read ({first_line(error)})."
    try:
        configs = list(datasets.get_dataset_config_names(place))
    except Exception as mistake:  # it is not there, or cannot be reached
        stop_if_told(mistake)
        if named.folder is not None:
            return f"{place} is not a file; a .txt or .jsonl file is expected, or a folder that datasets can load ({first_line(error)})."
        return f"There is no file {named.name!r}, and the dataset of that name could not be read ({first_line(error)})."
    if named.config is not None and named.config not in configs:
        return f"The data set {named.name!r} has no configuration {named.config!r}; it has: {_some(configs)}."
    if named.config is None and len(configs) > 1 and "default" not in configs and "onfig" in str(error):
        if named.split in configs:
            return (
                f"The data set {named.name!r} has no split {named.split!r}, which is one of its configurations; write "
                f"{named.name}:{named.split}/SPLIT, such as {named.name}:{named.split}/train."
            )
        return f"The data set {named.name!r} needs a configuration; write {named.name}:CONFIG/SPLIT with one of: {_some(configs)}."
    try:
        splits = list(datasets.get_dataset_split_names(place, named.config))
    except Exception as mistake:
        stop_if_told(mistake)
        splits = []
    asked = named.split or "train"
    if splits and asked not in splits:
        return f"The data set {named.name!r} has no split {asked!r}; it has: {_some(splits)}."
    return f"There is no file {named.name!r}, and the dataset of that name could not be read ({first_line(error)})."


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
