"""An output folder that is being filled: who may write to it, what is done already, and how a killed run goes on."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimoe.calibration.statistics import OtherFormat, Stats, from_main
from trimoe.checkpoint.atomic import refuse_odd, write_text
from trimoe.errors import Diverged, UserError
from trimoe.progress import LOG
from trimoe.team import ALONE, Team

FOLDER = ".trimoe"  # inside the output folder until the run is finished
EMPTY = {"lock", "inputs.json"}  # what is in it before the first stage is done
STAGE = "compressed"  # in it: what a recipe with recover trains
ANSWERS = "teacher-"  # in it: the original's distributions, in folders that are named after what they depend on


class Journal:
    """Stage results kept in `OUT/.trimoe`, valid for one set of inputs (model, recipe, calibration, seed, version). Of a team only the main
    process touches the folder; what it reads all get."""

    def __init__(
        self, out: Path, inputs: dict[str, Any], team: Team = ALONE, *, of: str = "an unfinished run", log: Path | None = None
    ):  # fmt: skip
        self.out, self.folder, self.inputs, self.team, self.of = out, out / FOLDER, inputs, team, of
        self.log = out / LOG if log is None else log
        self._lock: Any = None
        self._made: list[Path] = []  # files and folders that were not there before, the innermost first

    def refuse_other_content(self) -> None:
        """Before anything is written: the folder must be new, empty, or a killed run with the same inputs."""
        refuse_odd(self.out)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"The output {self.out} is no folder; give one that is empty or does not exist.")
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        begun = self.folder / "inputs.json"
        if not begun.is_file() and FOLDER in (names := {path.name for path in self.out.iterdir()}) and names <= {FOLDER, LOG}:
            return  # killed before it had begun, or forgotten
        if not begun.is_file():
            raise UserError(f"The output folder {self.out} is not empty; give one that is empty or does not exist.")
        before = self._read(begun)
        now = json.loads(json.dumps(self.inputs))
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise UserError(
                f"The output folder {self.out} holds {self.of} with another {changed[0]}; "
                "repeat its command to go on with it, or give another folder."
            )

    def __enter__(self) -> Journal:
        self.team.from_main(self._begin)
        return self

    def _begin(self) -> None:
        self._take()
        if (self.folder / "inputs.json").is_file():  # of a run that came in between
            self.refuse_other_content()
        write_text(self.folder / "inputs.json", json.dumps(self.inputs, indent=1))

    def _take(self) -> None:
        """The folder is this run's, or nothing happens."""
        self._made = [place for place in (self.log, self.folder, *self.folder.parents) if not place.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 (held until the run ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"Another run is writing to {self.out}; wait for it, or give another folder.") from None

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            if error and isinstance(error[1], UserError) and not isinstance(error[1], Diverged):  # whose log is worth reading
                with suppress(OSError):  # the mistake is what the user is to hear of
                    self._vacate()
            self._lock.close()

    def _vacate(self) -> None:
        """Where a mistake leaves nothing to go on with, nothing stays of what this run made; what an earlier one made is free for another."""
        if {path.name for path in self.out.iterdir()} <= {FOLDER, LOG} and {path.name for path in self.folder.iterdir()} <= EMPTY:
            if self.folder not in self._made:
                (self.folder / "inputs.json").unlink(missing_ok=True)
                return
            if self.log in self._made:
                self.log.unlink(missing_ok=True)
            shutil.rmtree(self.folder)
            for place in self._made:
                if place.is_dir() and not any(place.iterdir()):
                    place.rmdir()

    def get(self, stage: str) -> dict[str, Any] | None:
        path = self.folder / f"{stage}.json"
        return self.team.from_main(lambda: self._read(path) if path.is_file() else None)

    def _read(self, path: Path) -> Any:
        """Files here are written whole: what does not read was damaged since."""
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise UserError(f"{path}, by which the run would go on, is damaged; delete {self.folder} to begin it again.") from None

    def put(self, stage: str, value: dict[str, Any]) -> None:
        if self.team.main:
            write_text(self.folder / f"{stage}.json", json.dumps(value))

    def get_stats(self, stage: str) -> Stats | None:
        path = self.folder / f"{stage}.safetensors"

        def kept() -> Stats | None:
            with suppress(OtherFormat):  # of another version's run: they are gathered anew
                return Stats.load(path) if path.is_file() else None
            return None

        return from_main(self.team, kept)

    def put_stats(self, stage: str, stats: Stats) -> None:
        if self.team.main:
            stats.save(self.folder / f"{stage}.safetensors")

    @contextmanager
    def forgotten(self, mistake: type[UserError]) -> Iterator[None]:
        """Where `mistake` is raised, nothing is left to go on with: the same inputs would meet it again."""
        try:
            yield
        except mistake:
            if self.team.main:
                for path in (*self.folder.iterdir(), *self.out.glob("model-*.safetensors*")):
                    if path.is_file() and path.name != "lock":
                        path.unlink()
            raise

    def forget_training(self) -> None:
        """Another run may begin in the folder. What does not depend on how it trains stays: the first half of a recipe, the original's
        answers; and the lock, which this run still holds."""
        for path in self.folder.iterdir():
            if path.is_dir() and path.name != STAGE and not path.name.startswith(ANSWERS):
                shutil.rmtree(path)
            elif path.is_file() and path.name != "lock":
                path.unlink()

    def tidy(self) -> None:
        """What a run leaves that was killed between its last file and `close`, a recovery's in a recipe's folder too; nobody else may be at it."""
        if self.team.from_main(self.folder.exists):
            self.team.from_main(self._take)
            try:
                self.close()
            finally:
                self.__exit__()

    def close(self) -> None:
        """The run is finished: nothing but the checkpoint stays."""
        if self.team.main:
            shutil.rmtree(self.folder)
