"""Whether an engine loads a result: data, and the sentence that people read, which also is what lies in JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Loads = Literal["yes", "files", "no", "unknown"]  # files: it reads them, and whether it has kernels for them is not known
AROUND: dict[Loads, tuple[str, str]] = {
    "yes": ("yes", ""),
    "files": ("made for it", ""),
    "no": ("no (", ")"),
    "unknown": ("not known: ", ""),
}


@dataclass(frozen=True)
class Answer:
    """`why`: how the sentence goes on. `tried`: whether that was run; it is known where the answer was made, and not read back from JSON."""

    loads: Loads
    why: str = ""
    tried: bool = field(default=False, compare=False)

    @property
    def words(self) -> str:
        before, after = AROUND[self.loads]
        return before + self.why + after

    @classmethod
    def from_json(cls, words: str) -> Answer:
        for loads, (before, after) in AROUND.items():
            if words.startswith(before) and words.endswith(after):
                return cls(loads, words.removeprefix(before).removesuffix(after))
        return cls("unknown", words)  # of a stranger's file
