"""Text to token samples: seeded, fingerprinted, labelled by domain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimoe.checkpoint import Checkpoint
from trimoe.errors import UserError, first_line, stop_if_told
from trimoe.words import counted

TEXTS = Path(__file__).parent / "builtin" / "texts"
BUILTIN_DOMAINS = ("english", "docs", "code")
# The field's two texts as it reads them: joined into one document. PTB's own repository is a script; the hub's conversion is read instead.
HUB_TEXTS = {
    "wikitext2": ("hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1/{}-00000-of-00001.parquet", "text", "\n\n"),
    "ptb": ("hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet", "sentence", " "),
}
MAX_LINE = 50_000_000  # characters of one jsonl line or one document


@dataclass(frozen=True)
class Text:
    """Documents of one domain."""

    domain: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """`samples_NL` int64 token ids; `domains[n]` is the label of sample n."""

    samples_NL: torch.Tensor
    domains: tuple[str, ...]
    fingerprint: str

    def batches(self, device: str = "cpu") -> list[torch.Tensor]:
        """Samples in batches of the size that suits the device."""
        return in_batches(self.samples_NL, device)


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


def read_text(source: str, split: str = "calib") -> list[Text]:
    """Texts of `builtin:mixed`, `builtin:DOMAIN`, a .txt or .jsonl file (`name=path` labels it), `wikitext2` or `ptb` (their training part
    to calibrate, their test part to evaluate), or a `datasets` id (`org/name[:split]`)."""
    if source in HUB_TEXTS:
        return [_known_text(source, "train" if split == "calib" else "test")]
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        wanted = BUILTIN_DOMAINS if name == "mixed" else (name,)
        if not set(wanted) <= set(BUILTIN_DOMAINS):
            raise UserError(
                f"There is no built-in text {source!r}; there are: builtin:mixed, {', '.join('builtin:' + d for d in BUILTIN_DOMAINS)}."
            )
        return [Text(domain, tuple(_jsonl(TEXTS / f"builtin-{split}-{domain}.jsonl"))) for domain in wanted]
    if not source:
        raise UserError("A text has no name; a .txt or .jsonl file, a datasets id, or builtin:mixed is expected.")
    label, _, path = ("", "", source) if Path(source).expanduser().is_file() else source.rpartition("=")
    file = Path(path).expanduser()
    if file.is_file():
        try:
            documents = _jsonl(file) if file.suffix in (".jsonl", ".json") else _plain(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}).") from None
        return [Text(label or file.stem, tuple(documents))]
    if file.exists():
        raise UserError(f"{file} is not a file; a .txt or .jsonl file is expected.")
    if file.suffix in (".txt", ".jsonl", ".json") or path.count("/") != 1:
        raise UserError(f"There is no text file {path!r} (a .txt or .jsonl file, a datasets id, or builtin:mixed is expected).")
    return [_from_hub(path, label)]


def check_here(source: str) -> None:
    """Raises UserError for a text that lies on this machine, or should, and cannot be read or is empty; the hub is not asked."""
    if is_here(source):
        for text in read_text(source):
            if not any(text.documents):
                raise UserError(f"The text {source!r} is empty; give one that holds at least one sample.")


def most_tokens(sources: Sequence[str], samples: int, length: int) -> int:
    """How many tokens `samples` of `length` drawn from these texts are, at most: files of this machine are looked at for their size alone.
    Raises UserError for one that cannot hold a sample. (A tokenizer that makes more than two tokens of a byte is not known.)"""
    most = 0
    for source in sources:
        if not is_here(source):
            return samples * length
        for path in _files(source):
            if not path.is_file():
                read_text(source)  # says what is wrong
            holds = 2 * path.stat().st_size + 16
            if holds < length:
                raise UserError(f"The text {source!r} has fewer tokens than one sample of {length}; give more text or a smaller --length.")
            most += holds
    return min(samples * length, most)


def num_domains(sources: Sequence[str]) -> int:
    """How many domains these texts are, at most."""
    return sum(len(_files(source)) if source.startswith("builtin:") else 1 for source in sources)


def _files(source: str) -> list[Path]:
    """Where a text of this machine lies."""
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        return [TEXTS / f"builtin-calib-{domain}.jsonl" for domain in (BUILTIN_DOMAINS if name == "mixed" else (name,))]
    whole = Path(source).expanduser()
    return [whole if whole.is_file() else Path(source.rpartition("=")[2]).expanduser()]


def is_here(source: str) -> bool:
    """Whether a text lies on this machine, or should: it is no dataset's name."""
    path = Path(source.rpartition("=")[2])
    named = Path(source).exists() or path.exists() or path.suffix in (".txt", ".jsonl", ".json") or len(path.parts) != 2
    return named and source not in HUB_TEXTS


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


def _plain(file: Path) -> list[str]:
    if file.stat().st_size > MAX_LINE:
        raise UserError(
            f"{file} has {file.stat().st_size:,} bytes; at most {MAX_LINE:,} are read as one text (a .jsonl file may hold many)."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text.") from None
    if "\0" in text:
        raise UserError(f"{file} has NUL bytes: it is not text.")
    return [text] if text.strip() else []


def _jsonl(file: Path) -> list[str]:
    documents = []
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), ""), 1):  # never more than that in memory
                if not line.strip():
                    continue
                if len(line) > MAX_LINE:
                    raise UserError(f"{file}, line {number} has more than {MAX_LINE:,} characters, the most that are read.")
                try:
                    text = json.loads(line)["text"]
                    text.encode()  # half a surrogate pair is no text
                    documents.append(text)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise UserError(f'{file}, line {number} is not a JSON object with a "text" field that holds text.') from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text.") from None
    return documents


def _from_hub(path: str, label: str) -> Text:
    try:
        import datasets
    except ImportError:
        raise UserError(f"There is no file {path!r}; to read it as a dataset id, install trimoe[data] (it brings datasets).") from None
    name, _, split = path.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        documents = tuple(str(row["text"]) for row, _ in zip(rows, range(20_000), strict=False) if row.get("text"))
    except Exception as error:  # datasets raises anything from OSError to its own types
        stop_if_told(error)
        raise UserError(f"There is no file {path!r}, and the dataset of that name could not be read ({first_line(error)}).") from None
    return Text(label or name.rpartition("/")[2], documents)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        stop_if_told(error)
        raise UserError(f"{checkpoint.name} has no tokenizer that transformers can load ({first_line(error)}).") from None


def encode(tokenizer: Any, text: Text, vocabulary: int) -> list[torch.Tensor]:
    """One int64 tensor a document, without special tokens."""
    try:
        ids = tokenizer(list(text.documents), add_special_tokens=False, verbose=False)["input_ids"] if text.documents else []
    except Exception as error:  # a tokenizer that loads may still hold settings that cannot be
        stop_if_told(error)
        raise UserError(f"The model's tokenizer cannot read the text {text.domain!r} ({first_line(error)}).") from None
    tensors = [torch.tensor(row, dtype=torch.int64) for row in ids if len(row)]
    top = max((int(row.max()) for row in tensors), default=0)
    if top >= vocabulary:
        raise UserError(f"The tokenizer gives token {top}, the model knows {vocabulary}: tokenizer and model do not match.")
    return tensors


def calibrate(
    checkpoint: Checkpoint, sources: Sequence[str], *, samples: int, length: int, context: int, vocabulary: int, seed: int,
    part: tuple[float, float] = (0.0, 1.0),
) -> Calibration:  # fmt: skip
    """`samples` windows of `length` tokens (cut to `context`), spread evenly over the domains, drawn without overlap by `seed`.

    Documents of a domain are joined by the end-of-text token and cut into windows; a document never continues in another domain. `part`
    takes a stretch of each text's windows alone: (0, 0.95) and (0.95, 1) share none, and no document but the one at the border.
    """
    length = min(length, context)
    if not 0 <= seed < 1 << 63:
        raise UserError(f"The seed {seed} is out of range; 0 to 2^63 - 1 is allowed.")
    if length < 2 or samples < 1:
        raise UserError(f"Calibration wants at least 1 sample of at least 2 tokens, not {samples} of {length}.")
    tokenizer = load_tokenizer(checkpoint)
    texts = [text for source in sources for text in read_text(source)]
    eos = tokenizer.eos_token_id
    if eos is not None and eos >= vocabulary:
        raise UserError(f"The tokenizer ends texts with token {eos}, the model knows {vocabulary}: tokenizer and model do not match.")
    windows: dict[str, list[torch.Tensor]] = {}
    for text in texts:
        parts = [part for row in encode(tokenizer, text, vocabulary) for part in (row, *([torch.tensor([eos])] if eos is not None else []))]
        stream = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        if len(stream) < length:
            raise UserError(
                f"The text {text.domain!r} has {len(stream)} tokens, fewer than one sample of {length}; give more text or a smaller --length."
            )
        whole = stream[: len(stream) // length * length].view(-1, length)
        low, high = (len(whole) if end == 1 else min(round(end * len(whole)), len(whole) - 1) for end in part)
        if low == high:
            raise UserError(
                f"The text {text.domain!r} is one sample of {length} tokens, too few for a part of it to be held out; give more text."
            )
        windows.setdefault(text.domain, []).extend(whole[low:high])
    generator = torch.Generator().manual_seed(seed)
    shuffled = {domain: [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()] for domain, rows in windows.items()}
    chosen: list[tuple[str, torch.Tensor]] = []
    while len(chosen) < samples and any(shuffled.values()):
        for domain, rows in shuffled.items():
            if rows and len(chosen) < samples:
                chosen.append((domain, rows.pop()))
    samples_NL = torch.stack([row for _, row in chosen])
    digest = hashlib.sha256(samples_NL.numpy().tobytes()).hexdigest()[:32]
    return Calibration(samples_NL, tuple(domain for domain, _ in chosen), digest)
