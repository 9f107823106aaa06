"""Processes that start in milliseconds: they are forked from one that has imported what they need.

`Forks` is the tests' side. Run as a script, this file is the server: it imports the modules that it is told, then reads one line of JSON
for each team of processes. Each process gets the team's words (as they follow `python`), folder and environment, its own files for what it
says, and one thread. Python's hash seed, its import order and all that is read from the environment while importing are the server's.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TRIMOE = (
    "torch", "transformers", "transformers.generation", "trimoe.cli", "trimoe.compress", "trimoe.evaluate.run", "trimoe.recover.run",
    "trimoe.sweep.sweep",
)  # fmt: skip
TRANSFORMERS = ("torch", "transformers", "transformers.generation", "transformers.modeling_utils")
LONGEST = 1800  # seconds after which a process is taken for stuck, on a busy machine too


class Forks:
    """Starts processes like `python WORDS` in which `modules` are imported already. `environment` is what the modules see."""

    def __init__(self, modules: tuple[str, ...], environment: dict[str, str]):
        self.modules, self.environment = modules, {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.server: subprocess.Popen[str] | None = None

    def run(self, *words: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return self._run(words, cwd, [environment])[0]

    def team(self, count: int, *words: str | Path, **environment: str) -> list[subprocess.CompletedProcess[str]]:
        """As many processes as torchrun would start, by rank. None of them is ended because another one has died."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **environment}
        return self._run(words, None, [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)])

    def _run(
        self, words: tuple[str | Path, ...], cwd: Path | None, environments: list[dict[str, str]]
    ) -> list[subprocess.CompletedProcess[str]]:
        if self.server is None:
            command = [sys.executable, __file__, *self.modules]
            self.server = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        assert self.server.stdin is not None and self.server.stdout is not None
        with tempfile.TemporaryDirectory() as said:
            jobs = [
                {"words": [*map(str, words)], "cwd": str(cwd or Path.cwd()), "environment": environment, "said": f"{said}/{number}"}
                for number, environment in enumerate(environments)
            ]
            print(json.dumps(jobs), file=self.server.stdin, flush=True)
            codes = json.loads(self.server.stdout.readline())
            texts = [[Path(f"{said}/{number}.{name}").read_text() for name in ("out", "err")] for number in range(len(jobs))]
        return [subprocess.CompletedProcess(words, code, *both) for code, both in zip(codes, texts, strict=True)]

    def close(self) -> None:
        if self.server is not None:
            self.server.communicate()


def serve() -> None:
    """Fork what is asked for until nobody is left to ask. A forked process ends as any script does: this returns in it, or raises."""
    for line in sys.stdin:
        processes = []
        for job in json.loads(line):
            process = os.fork()
            if not process:
                run(job)
                return
            processes.append(process)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]), flush=True)


def run(job: dict[str, Any]) -> None:
    """Do in this process what was asked for."""
    signal.alarm(LONGEST)
    os.chdir(job["cwd"])
    os.environ |= job["environment"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['said']}.{name}", os.O_WRONLY | os.O_CREAT), number)
    how, *rest = job["words"]
    if how == "-c":
        sys.argv = [how, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif how == "-m":
        sys.argv = [how, *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [how, *rest]
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = ""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is imported is not looked through in every process again
    serve()
