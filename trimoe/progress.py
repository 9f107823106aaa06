"""Progress of long work: a live bar with the time left on a terminal, plain lines elsewhere, nothing when quiet; and the log file of a run.

The log, DIR/trimoe.log, is the one file of a result that has times in it: nothing reads it, and it is no part of what is the same for the
same inputs. It is appended to by every run on the folder.
"""

from __future__ import annotations

import copy
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trimoe.version import VERSION, versions

Item = TypeVar("Item")
Mode = Literal["auto", "plain", "quiet"]
LOG = "trimoe.log"
PLAIN_EVERY = 10.0  # seconds between plain lines of one stage
LOG_EVERY = 60.0  # seconds between lines in the log
TIME, STAMP = "%Y-%m-%dT%H:%M:%SZ", 20  # of a line in the log, and its characters


def resident() -> int:
    """Bytes of memory that this process holds now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak()


def peak() -> int:
    """The most it has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Count:
    """How far one stage is."""

    def __init__(self, label: str, total: int, tokens: float | None, begun: int = 0):
        self.label, self.total, self.tokens, self.begun, self.done, self.start = label, total, tokens, begun, begun, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def rate(self) -> str:
        """Tokens a second so far, where the items are made of tokens, and memory."""
        here = self.done - self.begun
        speed = f"{here * self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s, " if self.tokens and here else ""
        return f"{speed}{resident() / 2**30:.2f} GiB"

    def line(self) -> str:
        here = self.done - self.begun
        left = f", {self.seconds / here * (self.total - self.done):.0f} s left" if here else ""
        return (
            f"{self.label}: {self.done}/{self.total}{left}, {self.rate()}"
            if self.total
            else f"{self.label}: {self.seconds:.0f} s, {self.rate()}"
        )


class Reporter:
    """Announces stages. `mode` auto: live on a terminal, plain lines otherwise (and with TERM=dumb)."""

    def __init__(self, mode: Mode = "quiet"):
        self.console = Console(stderr=True)
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.mode: Mode = "plain" if mode == "auto" and not live else mode
        self.log: Path | None = None
        self.early: list[str] | None = None  # what one run said before it had a log

    def fresh(self) -> Reporter:
        """One that speaks in the same way, for one run."""
        new = copy.copy(self)
        new.log, new.early = None, []
        return new

    def say(self, message: str) -> None:
        """One line, unless quiet; in the log always."""
        self.note(message)
        if self.mode != "quiet":
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    # ---- the log

    def note(self, message: str) -> None:
        """One line in the log alone."""
        line = f"{datetime.now(UTC):{TIME}}  {message}\n"
        if self.log is None and self.early is not None:
            self.early.append(line)
        elif self.log is not None:
            self._append([line])

    def _append(self, lines: list[str]) -> None:
        """To the log; where the disk has no room for it, the run says so itself when it writes what matters."""
        assert self.log is not None
        with suppress(OSError), open(self.log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)

    @contextmanager
    def logging(self, path: Path, head: Iterable[str]) -> Iterator[None]:
        """Append to the file `path`, first `head` and what was said so far; at the end how long it took and the most memory. What was the
        log before is so again afterwards."""
        start, outer = time.monotonic(), self.log
        self.log, early, self.early = path, self.early or [], None  # what is said after it is in no log
        stamp = early[0][:STAMP] if early else f"{datetime.now(UTC):{TIME}}"
        self._append([*(f"{stamp}  {line}\n" for line in head), *early])
        try:
            yield
        except BaseException as error:
            self.note(f"Stopped: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            raise
        finally:
            self.note(f"{time.monotonic() - start:.1f} s in all, at most {peak() / 2**30:.2f} GiB of memory")
            self.log = outer

    # ---- stages

    def finished(self, label: str, seconds: float, about: str) -> None:
        """A stage is over; with what there is to say about it."""
        self.note(f"{label}: done in {seconds:.1f} s, {about}, peak {peak() / 2**30:.2f} GiB")

    @contextmanager
    def _shown(self, count: _Count) -> Iterator[Progress | None]:
        self.note(f"{count.label}: begins" + (f", {count.total} to do" if count.total else ""))
        if self.mode == "auto":
            columns: tuple[Any, ...] = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            if not count.total:
                columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, TextColumn("{task.fields[rate]}"), console=self.console, transient=not count.total) as bar:
                bar.add_task(count.label, total=count.total or None, rate="")
                yield bar
            return
        over = threading.Event()
        if self.mode == "plain":
            threading.Thread(target=_beat, args=(count, over), daemon=True).start()
        try:
            yield None
        finally:
            over.set()

    def track(self, items: Iterable[Item], label: str, total: int, *, tokens: float | None = None) -> Iterator[Item]:
        """The items, with progress under `label`; `tokens`: how many each stands for."""
        with self.steps(label, 0, total, tokens=tokens) as advance:
            for done, item in enumerate(items, 1):
                yield item
                advance(done, "")

    @contextmanager
    def steps(self, label: str, begun: int, total: int, *, tokens: float | None = None) -> Iterator[Callable[[int, str], None]]:
        """A function (steps done, what to say beside the label) for work that was at `begun` of `total` steps before."""
        count, noted = _Count(label, total, tokens, begun), time.monotonic()
        with self._shown(count) as bar:

            def advance(done: int, about: str) -> None:
                nonlocal noted
                count.done, count.label = done, label + about
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=done, description=count.label, rate=count.rate())
                if time.monotonic() - noted >= LOG_EVERY:
                    noted = time.monotonic()
                    self.note(count.line())

            yield advance
        if self.mode == "plain":
            print(f"{count.label}: done in {count.seconds:.1f} s, {count.rate()}", file=sys.stderr, flush=True)
        self.finished(count.label, count.seconds, count.rate())

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Work that cannot be counted; plain lines mention it if it takes long."""
        count = _Count(label, 0, None)
        with self._shown(count):
            yield
        self.finished(label, count.seconds, count.rate())


def logged(reporter: Reporter, path: Path, command: str, *, main: bool = True) -> AbstractContextManager[None]:
    """The log of a run, appended to `path` by the main process: versions, command, stages, times, memory, warnings."""
    import torch

    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = [f"trimoe {VERSION}: {command}", f"{about}; {torch.get_num_threads()} threads"]
    return reporter.logging(path, head) if main else nullcontext()


def _beat(count: _Count, over: threading.Event) -> None:
    """A plain line now and then, however long one item takes."""
    while not over.wait(PLAIN_EVERY):
        print(count.line(), file=sys.stderr, flush=True)


QUIET = Reporter("quiet")
