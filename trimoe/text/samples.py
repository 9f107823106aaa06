"""Text to token samples: seeded, fingerprinted, labelled by domain."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError, first_line, stop_if_told
from trimoe.show.format import counted
from trimoe.text import data_set, text_file
from trimoe.text.data_set import Named
from trimoe.text.documents import START, Conversation, Document

TEXTS = Path(__file__).parents[1] / "builtin" / "texts"
BUILTIN_DOMAINS = ("english", "docs", "code")
# The field's two texts as it reads them: joined into one document. PTB's own repository is a script; the hub's conversion is read instead.
HUB_TEXTS = {
    "wikitext2": ("hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1/{}-00000-of-00001.parquet", "text", "\n\n"),
    "ptb": ("hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet", "sentence", " "),
}
MAX_LINE = 50_000_000  # characters of one jsonl line or one document
TOKENIZERS = ("tokenizer", "vocab", "merges", "spiece", "added_tokens")  # how their files' names begin
CHARACTERS = 16  # of a data set that are read for each token that is asked for: no text has so many in a token
TOKENS = 1 << 20  # that are asked for where nothing else is said


@dataclass(frozen=True)
class Text:
    """Documents of one domain. `samples`: how many are to be drawn from it, None for an equal share of all."""

    domain: str
    documents: tuple[Document, ...]
    samples: int | None = None


@dataclass(frozen=True)
class Calibration:
    """`samples_NL` int64 token ids, of which those that begin a document that is kept apart carry a mark (documents.py); `domains[n]` is the
    label of sample n. `notes`: what a reader should know of how the text was read."""

    samples_NL: torch.Tensor
    domains: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each domain."""
        return dict(sorted(Counter(self.domains).items()))

    def batches(self, device: str = "cpu") -> list[torch.Tensor]:
        """Samples in batches of the size that suits the device."""
        return in_batches(self.samples_NL, device) if len(self.samples_NL) else []


NO_TEXT = Calibration(torch.empty(0, 0, dtype=torch.int64), (), "none")  # of a recipe that reads none


def in_batches(samples_NL: torch.Tensor, device: str) -> list[torch.Tensor]:
    """Batches of about as many tokens as suit the device."""
    return list(samples_NL.split(per_batch(samples_NL.shape[1], device)))


def per_batch(length: int, device: str) -> int:
    """Samples of so many tokens in one batch."""
    return max(1, batch_tokens(device) // length)


def check_shared_out(batches: int, processes: int) -> None:
    """Raises UserError where some of the processes would have no batch."""
    if batches < processes:
        made = counted(batches, "batch", "batches")
        raise UserError(
            f"The calibration text makes {made}, too few for {processes} processes; start fewer, or take more --samples or text."
        )


def batch_tokens(device: str) -> int:
    """2,048 on a CPU, where more only takes memory, and 16,384 elsewhere."""
    return 2048 if torch.device(device).type == "cpu" else 16384


def read_text(source: str, split: str = "calib", *, tokens: int = TOKENS, seed: int = 0) -> list[Text]:
    """Texts of `builtin:mixed`, `builtin:DOMAIN`, a file (text_file.py; `name=path` labels it, `path#field` names the rows' field),
    `wikitext2` or `ptb` (their training part to calibrate, their test part to evaluate), or a data set by name (data_set.py), of which so
    much is read as holds `tokens`, in an order that `seed` draws."""
    parts = data_set.several(source)
    if len(parts) > 1:
        return [text for part in parts for text in read_text(part, split, tokens=tokens, seed=seed)]
    if source in HUB_TEXTS:
        return [_known_text(source, "train" if split == "calib" else "test")]
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        wanted = BUILTIN_DOMAINS if name == "mixed" else (name,)
        if not set(wanted) <= set(BUILTIN_DOMAINS):
            raise UserError(
                f"There is no built-in text {source!r}; there are: builtin:mixed, {', '.join('builtin:' + d for d in BUILTIN_DOMAINS)}."
            )
        return [Text(domain, tuple(text_file.documents(TEXTS / f"builtin-{split}-{domain}.jsonl", None, MAX_LINE))) for domain in wanted]
    if not source:
        raise UserError("A text has no name; a .txt or .jsonl file, a datasets id, or builtin:mixed is expected.")
    where = _place(source)
    if where.file.is_file():
        try:
            documents = text_file.documents(where.file, where.column, MAX_LINE)
        except OSError as error:
            raise UserError(f"{where.file} cannot be read ({error.strerror or first_line(error)}).") from None
        return [Text(where.label or where.file.name.partition(".")[0] or where.file.stem, tuple(documents), where.samples)]
    if where.file.exists() and not where.file.is_dir():
        raise UserError(f"{where.file} is not a file; a .txt or .jsonl file is expected.")
    named = Named.of(where.path)
    if named is None or (named.folder is None and (text_file.is_text_name(where.file) or not named.on_hub)):
        odd = named is None and not text_file.is_text_name(where.file) and any(mark in where.path for mark in "[](#")
        hint = f"; a data set is written {data_set.WRITTEN}" if odd else ""
        raise UserError(f"There is no text file {where.path!r} (a .txt or .jsonl file, a datasets id, or builtin:mixed is expected{hint}).")
    found = data_set.documents(named, split, CHARACTERS * tokens, seed)
    return [Text(where.label or _label(named), tuple(found), named.samples)]


def _label(named: Named) -> str:
    """The domain of a data set without a label: its own name, and the configuration's."""
    own = named.name.rstrip("/").rpartition("/")[2]
    return own if named.config is None else f"{own}-{named.config}"


@dataclass(frozen=True)
class _Place:
    """A source taken apart as a file's: `path` is what it says without the label, `file` what that means as a path."""

    label: str
    path: str
    file: Path
    column: str | None
    samples: int | None


def _place(source: str) -> _Place:
    """`label=FILE#FIELD:SAMPLES`; a file of that whole name goes first."""
    label, _, path = ("", "", source) if Path(source).expanduser().is_file() else source.rpartition("=")
    file, column, samples = Path(path).expanduser(), None, None
    if not file.exists():
        rest, _, number = path.rpartition(":")
        if rest and number.isdecimal() and int(number):
            path, samples = (rest, int(number)) if _is_file(rest) else (path, None)
        rest, mark, name = path.rpartition("#")
        if mark and name and Path(rest).expanduser().is_file():
            path, column = rest, name
        file = Path(path).expanduser()
    return _Place(label, path, file, column, samples)


def _is_file(path: str) -> bool:
    """Whether a path, or what stands before a # in it, is a file's."""
    return any(Path(part).expanduser().is_file() for part in (path, path.rpartition("#")[0]) if part)


def check_here(source: str) -> None:
    """Raises UserError for a text that lies on this machine, or should, and cannot be read or is empty; the hub is not asked."""
    if is_here(source):
        for text in read_text(source):
            if not any(text.documents):
                raise UserError(f"The text {source!r} is empty; give one that holds at least one sample.")


def most_tokens(sources: Sequence[str], samples: int, length: int) -> int:
    """How many tokens `samples` of `length` drawn from these texts are, at most: files of this machine are looked at for their size alone.
    Raises UserError for one that cannot hold a sample. (A tokenizer that makes more than two tokens of a byte is not known.)"""
    most, unknown = 0, False
    wanted = drawn(sources, samples)
    for source in sources:
        if not is_here(source):
            unknown = True
            continue
        for path in _files(source):
            if not path.is_file() and not path.is_dir():
                read_text(source)  # says what is wrong
            if path.is_dir() or text_file.packed(path):
                unknown = True  # how long it is unpacked is not known
                continue
            holds = 2 * path.stat().st_size + 16
            if holds < length:
                raise UserError(f"The text {source!r} has fewer tokens than one sample of {length}; give more text or a smaller --length.")
            most += holds
    return wanted * length if unknown else min(wanted * length, most)


def drawn(sources: Sequence[str], samples: int) -> int:
    """How many samples are drawn: those that texts ask for by number, and of the others at least one each."""
    asked, others = 0, 0
    for source in (part for one in sources for part in data_set.several(one)):
        named = None if source.startswith("builtin:") else Named.of(_place(source).path)
        number = None if source.startswith("builtin:") else _place(source).samples or (named.samples if named is not None else None)
        asked += number or 0
        others += 0 if number else len(BUILTIN_DOMAINS) if source == "builtin:mixed" else 1
    return asked + (max(samples - asked, others) if others else 0)


def num_domains(sources: Sequence[str]) -> int:
    """How many domains these texts are, at most."""
    return sum(len(_files(source)) if source.startswith("builtin:") else len(data_set.several(source)) for source in sources)


def _files(source: str) -> list[Path]:
    """Where a text of this machine lies."""
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        return [TEXTS / f"builtin-calib-{domain}.jsonl" for domain in (BUILTIN_DOMAINS if name == "mixed" else (name,))]
    found = []
    for part in data_set.several(source):
        place = _place(part)
        named = Named.of(place.path)
        found.append(place.file if place.file.is_file() or named is None or named.folder is None else named.folder)
    return found


def is_here(source: str) -> bool:
    """Whether a text lies on this machine, or should: it is no data set's name."""
    if source in HUB_TEXTS:
        return False
    parts = data_set.several(source)
    if len(parts) > 1:
        return all(map(is_here, parts))
    place = _place(source)
    named = None if place.file.exists() or text_file.is_text_name(place.file) else Named.of(place.path)
    return named is None or not named.on_hub


def _known_text(name: str, split: str) -> Text:
    pattern, column, between = HUB_TEXTS[name]
    instead = f"give its {split} part as a file instead: {name}=FILE.txt"
    try:
        import datasets
    except ImportError:
        raise UserError(f"The text {name!r} is read with datasets; pip install 'trimoe[data]', or {instead}.") from None
    try:
        rows = datasets.load_dataset("parquet", data_files={split: pattern.format(split)}, split=split)
        return Text(name, (between.join(rows[column]),))
    except Exception as error:  # datasets raises anything from OSError to its own types
        stop_if_told(error)
        raise UserError(f"The text {name!r} could not be read from the Hugging Face hub ({first_line(error)[:120]}); {instead}.") from None


# ---- tokens


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's own. Raises UserError where transformers cannot load it without running code that lies beside it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        stop_if_told(error)
        said = str(error)
        names = [
            path.name for path in checkpoint.folder.iterdir() if path.name.startswith(TOKENIZERS) or path.suffix in (".model", ".tiktoken")
        ]
        if not names:
            raise UserError(f"{checkpoint.name} has no tokenizer: none of a tokenizer's files is in the folder.") from None
        needed = [name for name in ("sentencepiece", "tiktoken") if name in said.lower() and find_spec(name) is None]
        hint = f"; it may need a package that is not installed: {' or '.join(needed)}" if needed else ""
        if "trust_remote_code" in said:
            raise UserError(
                f"{checkpoint.name} has a tokenizer that is Python code of its own, which trimoe does not run; put a tokenizer.json beside it "
                "that transformers loads without trust_remote_code."
            ) from None
        raise UserError(f"{checkpoint.name} has no tokenizer that transformers can load ({first_line(error)}){hint}.") from None


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every text by its own default, such as one that says that a text begins; none for many."""
    try:
        bare, whole = (list(tokenizer("x", add_special_tokens=special)["input_ids"]) for special in (False, True))
    except Exception as error:  # as in encode
        stop_if_told(error)
        raise UserError(f"The model's tokenizer cannot read a text ({first_line(error)}).") from None
    place = next((start for start in range(len(whole)) if bare and whole[start : start + len(bare)] == bare), 0)
    return tuple(whole[:place])


def encode(tokenizer: Any, text: Text, vocabulary: int) -> list[torch.Tensor]:
    """One int64 tensor a document, without special tokens but those that a chat template writes; what the tokenizer opens every text with
    is left out there, too."""
    whole = [one.rendered(tokenizer) if isinstance(one, Conversation) else one for one in text.documents]
    try:
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"] if whole else []
    except Exception as error:  # a tokenizer that loads may still hold settings that cannot be
        stop_if_told(error)
        raise UserError(f"The model's tokenizer cannot read the text {text.domain!r} ({first_line(error)}).") from None
    first = list(opening(tokenizer))
    bodies = [row[len(first) :] if first and row[: len(first)] == first else row for row in ids]
    tensors = [torch.tensor(row, dtype=torch.int64) for row in bodies if len(row)]
    top = max((int(row.max()) for row in tensors), default=0)
    if top >= vocabulary:
        raise UserError(f"The tokenizer gives token {top}, the model knows {vocabulary}: tokenizer and model do not match.")
    return tensors


def calibrate(
    checkpoint: Checkpoint, sources: Sequence[str], *, samples: int, length: int, context: int, vocabulary: int, seed: int,
    part: tuple[float, float] = (0.0, 1.0), apart: bool = False, tokens: int | None = None,
) -> Calibration:  # fmt: skip
    """`samples` windows of `length` tokens (cut to `context`), spread evenly over the domains, drawn without overlap by `seed`; at least one
    of each domain, and of texts that ask for a number so many.

    Documents of a domain are joined by the end-of-text token and cut into windows; a document never continues in another domain. Every
    document, and every window, begins with what the tokenizer opens a text with. `apart`: a window's tokens see those of their own
    document alone. `part` takes a stretch of each text's windows: (0, 0.95) and (0.95, 1) share none, and no document but the one at the
    border. `tokens`: how many a data set's text is read for (as many as are drawn).
    """
    length = min(length, context)
    if not 0 <= seed < 1 << 63:
        raise UserError(f"The seed {seed} is out of range; 0 to 2^63 - 1 is allowed.")
    if length < 2 or samples < 1:
        raise UserError(f"Calibration wants at least 1 sample of at least 2 tokens, not {samples} of {length}.")
    tokenizer = load_tokenizer(checkpoint)
    wanted = tokens or drawn(sources, samples) * length
    texts = [text for source in sources for text in read_text(source, tokens=wanted, seed=seed)]
    eos, first = tokenizer.eos_token_id, opening(tokenizer)
    if eos is not None and eos >= vocabulary:
        raise UserError(f"The tokenizer ends texts with token {eos}, the model knows {vocabulary}: tokenizer and model do not match.")
    if len(first) >= length:
        raise UserError(f"The tokenizer begins every text with {len(first)} tokens, which fill a sample of {length}; take longer samples.")
    windows: dict[Key, list[torch.Tensor]] = {}
    asked: dict[Key, int] = {}
    for number, text in enumerate(texts):
        whole = _windows(_joined(encode(tokenizer, text, vocabulary), first, eos), length, first, apart, text.domain)
        low, high = (len(whole) if end == 1 else min(round(end * len(whole)), len(whole) - 1) for end in part)
        if low == high:
            raise UserError(
                f"The text {text.domain!r} is one sample of {length} tokens, too few for a part of it to be held out; give more text."
            )
        key = (text.domain, None if text.samples is None else number)
        windows.setdefault(key, []).extend(whole[low:high])
        if text.samples is not None:
            asked[key] = max(1, round(text.samples * (part[1] - part[0])))
    generator = torch.Generator().manual_seed(seed)
    shuffled = {key: [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()] for key, rows in windows.items()}
    chosen = _draw(shuffled, asked, samples)
    samples_NL = torch.stack([row for _, row in chosen])
    digest = hashlib.sha256(samples_NL.numpy().tobytes()).hexdigest()[:32]
    return Calibration(samples_NL, tuple(domain for domain, _ in chosen), digest, _notes(tokenizer, texts))


Key = tuple[str, int | None]  # a domain, or one text that asks for a number of its own


def _draw(shuffled: dict[Key, list[torch.Tensor]], asked: dict[Key, int], samples: int) -> list[tuple[str, torch.Tensor]]:
    """Windows with their domains, one of each key in turn: as many as are asked for, and of the others what is left of `samples`."""
    free = [key for key in shuffled if key not in asked]
    left, others = dict(asked), max(samples - sum(asked.values()), len(free)) if free else 0
    chosen: list[tuple[str, torch.Tensor]] = []
    while True:
        before = len(chosen)
        for key, rows in shuffled.items():
            if rows and (left[key] if key in asked else others):
                chosen.append((key[0], rows.pop()))
                if key in asked:
                    left[key] -= 1
                else:
                    others -= 1
        if len(chosen) == before:
            return chosen


def _notes(tokenizer: Any, texts: Sequence[Text]) -> tuple[str, ...]:
    plain = sorted({text.domain for text in texts if any(isinstance(one, Conversation) for one in text.documents)})
    if not plain or getattr(tokenizer, "chat_template", None):
        return ()
    return (f"The tokenizer has no chat template: conversations ({', '.join(plain)}) are read as plain text, without who says what.",)


def _joined(bodies: Sequence[torch.Tensor], first: tuple[int, ...], eos: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """All documents of a text in one row, each with what opens it and the end-of-text token, and the places where they begin."""
    opened, ended = torch.tensor(first, dtype=torch.int64), torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    pieces = [torch.cat([opened, body, ended]) for body in bodies]
    if not pieces:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    sizes = torch.tensor([0, *(len(piece) for piece in pieces[:-1])])
    return torch.cat(pieces), sizes.cumsum(0)


def _windows(
    joined: tuple[torch.Tensor, torch.Tensor], length: int, first: tuple[int, ...], apart: bool, domain: str
) -> list[torch.Tensor]:
    """Windows of `length` tokens that share none. Each begins with what opens a text; `apart`, tokens that begin a document are marked."""
    stream, starts = joined
    opened = torch.tensor(first, dtype=torch.int64)
    if apart:
        stream = stream.clone()
        stream[starts] += START
    found, place, many = [], 0, len(first)
    while True:
        begins = bool((stream[place : place + many] % START).equal(opened))
        own = length if begins else length - many
        if place + own > len(stream):
            break
        row = stream[place : place + own]
        found.append(row if begins else torch.cat([opened, row]))
        place += own
    if not found:
        raise UserError(
            f"The text {domain!r} has {len(stream)} tokens, fewer than one sample of {length}; give more text or a smaller --length."
        )
    return found
