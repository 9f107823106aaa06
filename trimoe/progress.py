"""Progress of long work: a live bar with the time left on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
Mode = Literal["auto", "plain", "quiet"]
PLAIN_EVERY = 10.0  # seconds between plain lines of one stage


class Reporter:
    """Announces stages. `mode` auto: live on a terminal, plain lines otherwise."""

    def __init__(self, mode: Mode = "quiet"):
        self.console = Console(stderr=True)
        self.mode: Mode = "plain" if mode == "auto" and not self.console.is_terminal else mode

    def say(self, message: str) -> None:
        """One line, unless quiet."""
        if self.mode != "quiet":
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Progress | None]:
        if self.mode != "auto":
            yield None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=False) as bar:
            bar.add_task(label, total=total)
            yield bar

    def track(self, items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
        """The items, with progress under `label`."""
        start = last = time.monotonic()
        with self._bar(label, total) as bar:
            for done, item in enumerate(items, 1):
                yield item
                now = time.monotonic()
                if bar is not None:
                    bar.advance(bar.task_ids[0])
                elif self.mode == "plain" and done < total and now - last >= PLAIN_EVERY:
                    last = now
                    print(f"{label}: {done}/{total}, {(now - start) / done * (total - done):.0f} s left", file=sys.stderr, flush=True)
        if self.mode == "plain":
            print(f"{label}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


QUIET = Reporter("quiet")
