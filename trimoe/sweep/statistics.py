"""Statistics that the first steps of several variants start from: one pass over the calibration text for all that would gather the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimoe.calibration.gather import statistics
from trimoe.calibration.search_tokens import gram_side, search_budget
from trimoe.calibration.statistics import Stats
from trimoe.methods.lab import Lab
from trimoe.progress import Reporter

NO_SEARCH = "sums alone"


@dataclass(frozen=True)
class Shared:
    """`runs`: the variants by name. The files lie in `out`."""

    out: Path
    runs: dict[str, Lab]
    reporter: Reporter

    def files(self, wanted: set[str]) -> dict[str, Path]:
        """A file by the variant's name: one pass over the calibration text for all first steps that start from the same text and search on
        the same tokens, to the same reach. Those that search on none take the sums of any such pass."""
        groups = self._groups()
        files: dict[str, Path] = {}
        for about, kinds in groups.items():
            bare = kinds.pop(NO_SEARCH, [])
            for search, own in kinds.items():
                path = self._pass(about + search, own, bare, wanted)
                if path is None:
                    continue
                files |= dict.fromkeys(own, path)
                if bare:
                    files |= dict.fromkeys(bare, self._bare(about, path))
                    bare = []
            path = self._pass(about + NO_SEARCH, bare, [], wanted) if bare else None
            files |= {} if path is None else dict.fromkeys(bare, path)
        if files and (alone := len(wanted - set(files))):
            self.reporter.say(f"{alone} variants do without: their first step needs no statistics, or other ones, or other text.")
        return files

    def nbytes(self, each: Mapping[str, int]) -> int:
        """Bytes of the files that are still to be written, at most; `each`: of one variant's own statistics. A variant alone writes none."""
        return sum(
            max(each[name] for name in own)
            for about, kinds in self._groups().items() if sum(map(len, kinds.values())) > 1
            for search, own in kinds.items() if not self._file(about + search).exists()
        )  # fmt: skip

    def _groups(self) -> dict[str, dict[str, list[str]]]:
        """Variants by calibration text and search tokens."""
        groups: dict[str, dict[str, list[str]]] = {}
        for name, run in self.runs.items():
            search = _searched(run)
            if search is not None:
                groups.setdefault(json.dumps(run.about), {}).setdefault(search, []).append(name)
        return groups

    def _pass(self, key: str, own: Sequence[str], bare: Sequence[str], wanted: set[str]) -> Path | None:
        """The file of the pass that `own` need and that serves `bare` too; None where it would serve one variant, which gathers it itself."""
        path, run = self._file(key), self.runs[own[0]]
        served = [*own, *bare]
        if not path.exists():
            if len(served) == 1 or not set(served) & wanted:
                return None
            self.reporter.say(f"One statistics pass for {len(served)} variants.")
            statistics(
                run.skeleton, run.batches, reach=run.steps[0].reach(dict(run.skeleton.sites)), search_tokens=run.spec.search_tokens,
                search_memory=run.spec.search_memory, seed=run.seed, device=run.device, about=run.about, reporter=self.reporter,
            ).save(path)  # fmt: skip
        return path

    def _bare(self, about: str, path: Path) -> Path:
        """The pass at `path` as a step that does not search would have gathered it."""
        bare = self._file(about + NO_SEARCH)
        if not bare.exists():
            Stats.load(path).without_search().save(bare)
        return bare

    def _file(self, key: str) -> Path:
        return self.out / f"statistics-{hashlib.sha256(key.encode()).hexdigest()[:8]}.safetensors"


def _searched(run: Lab) -> str | None:
    """What of the search tokens the first step is given: among how many experts in each layer, and how many tokens. None where it cannot
    start from shared statistics."""
    step, sites = run.steps[0], dict(run.skeleton.sites)
    if not step.gathers or "spectra" in step.needs:
        return None
    reach = step.reach(sites)
    if not reach:
        return NO_SEARCH
    tokens = search_budget(list(sites.values()), reach, run.spec.search_tokens, run.spec.search_memory)
    return json.dumps([[gram_side(site, reach) for site in sites.values()], tokens])
