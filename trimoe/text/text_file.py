"""Files of text: plain ones, and rows as JSON lines, JSON arrays, parquet and tables; packed by gzip and others, in any Unicode encoding
that says which it is."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from trimoe.errors import UserError, first_line, stop_if_told
from trimoe.text.documents import Document, document

MAX_ARRAY = 1_000_000_000  # characters of a JSON array, which is read whole
LINES, TABLES = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}
ROWS = (*LINES, *TABLES, ".parquet")
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS = (  # the longer ones first: one begins with another
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


def suffix_of(path: Path) -> str:
    """What kind of text a name says it is, whatever it is packed by: `.jsonl` of a.jsonl.gz."""
    names = [suffix.lower() for suffix in path.suffixes]
    while names and names[-1] in (*PACKED, ".zst"):
        names.pop()
    return names[-1] if names else ""


def packed(path: Path) -> bool:
    """Whether the text is longer than the file by an amount that is not known before it is read."""
    return path.suffix.lower() in (*PACKED, ".zst", ".parquet")


def is_text_name(path: Path) -> bool:
    """Whether a name is a text file's, be it there or not."""
    return suffix_of(path) in (".txt", *ROWS) or path.suffix.lower() in (*PACKED, ".zst")


def documents(file: Path, column: str | None, most: int) -> list[Document]:
    """All documents of a file; a row, and a plain text, has at most `most` characters. Raises UserError for what is no text, and OSError for
    what cannot be opened."""
    kind = suffix_of(file)
    if kind not in ROWS:
        if column is not None:
            raise UserError(f"{file} is plain text and has no field {column!r}; rows are read from: {', '.join(ROWS)}.")
        return list(_plain(file, most))
    try:
        rows = _table(file, TABLES[kind], most) if kind in TABLES else _parquet(file) if kind == ".parquet" else _json(file, kind, most)
        return [document(row, column, f"{file}, {where}") for where, row in rows]
    except UnicodeError:
        raise UserError(f"{file} is not UTF-8 text.") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{file} cannot be unpacked ({first_line(error)}).") from None


def _bytes(file: Path) -> IO[bytes]:
    """The file, unpacked as it is read."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{file} is packed by zstd, which needs the package zstandard; install it, or unpack the file.") from None
        unpacked: IO[bytes] = zstandard.open(file, "rb")
        return unpacked
    return PACKED[suffix](file, "rb") if suffix in PACKED else open(file, "rb")


def _opened(file: Path) -> IO[str]:
    """The file as text, in the encoding that its first bytes say; UTF-8 where they say none."""
    with _bytes(file) as raw:
        first = raw.read(4)
    encoding = next((name for mark, name in MARKS if first.startswith(mark)), "utf-8")
    return io.TextIOWrapper(_bytes(file), encoding=encoding, newline="" if suffix_of(file) in TABLES else None)


def _plain(file: Path, most: int) -> Iterator[str]:
    try:
        with _opened(file) as source:
            text = source.read(most + 1)
    except UnicodeError:
        raise UserError(f"{file} is not UTF-8 text.") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{file} cannot be unpacked ({first_line(error)}).") from None
    if len(text) > most:
        nbytes = file.stat().st_size
        raise UserError(f"{file} has {nbytes:,} bytes; at most {most:,} are read as one text (a .jsonl file may hold many).")
    if "\0" in text:
        raise UserError(f"{file} has NUL bytes: it is not text.")
    if text.strip():
        yield text


def _json(file: Path, kind: str, most: int) -> Iterator[tuple[str, Any]]:
    """Rows of JSON lines; of a file .json also those of an array, or one row over several lines."""
    with _opened(file) as lines:
        numbered = enumerate(iter(lambda: lines.readline(most + 1), ""), 1)  # never more than that in memory
        for number, line in numbered:
            if not line.strip():
                continue
            if len(line) > most and kind != ".json":
                raise UserError(f"{file}, line {number} has more than {most:,} characters, the most that are read.")
            row = _parsed(line)
            if kind == ".json" and (row is None or isinstance(row, list)):  # no row a line
                yield from _whole(file, line, (part for _, part in numbered))
                return
            yield f"line {number}", row
            kind = ".jsonl"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _whole(file: Path, first: str, rest: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON array; a single object is one."""
    parts, held = [first], len(first)
    for part in rest:
        parts.append(part)
        held += len(part)
        if held > MAX_ARRAY:
            raise UserError(f"{file} is a JSON array of more than {MAX_ARRAY:,} characters; write it as one row a line (.jsonl).")
    whole = _parsed("".join(parts))
    if whole is None:
        raise UserError(f"{file} is neither JSON lines nor a JSON array: line 1 is not a JSON object, and the file as a whole is none.")
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"row {number}", row


def _table(file: Path, between: str, most: int) -> Iterator[tuple[str, Any]]:
    """Rows of a table whose first line names the columns."""
    csv.field_size_limit(most)
    with _opened(file) as lines:
        try:
            for number, row in enumerate(csv.DictReader(lines, delimiter=between), 1):
                yield f"row {number}", {name: value for name, value in row.items() if name is not None}
        except csv.Error as error:
            raise UserError(f"{file} does not read as a table ({first_line(error)}).") from None


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} is parquet, which needs pyarrow; pip install 'trimoe[data]', or write it as .jsonl.") from None
    number = itertools.count(1)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield f"row {next(number)}", row
    except (pyarrow.ArrowException, OSError) as error:
        stop_if_told(error)
        raise UserError(f"{file} does not read as parquet ({first_line(error)}).") from None
