"""How fast a model answers and how much memory it takes, on this machine; the original and the compressed one in turns, in one run.

Each model lives in a process of its own, so that neither's memory hides in the other's; they work on command, one at a time, and the
order flips every round, so that a machine that slows down or speeds up favours neither. Prompts are random tokens (the same ones for
both models of one vocabulary): speed does not depend on what they say, but which experts they reach does, a little.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError
from trimoe.model import transformers5
from trimoe.model.precision import compute_dtype, dtype_name
from trimoe.progress import QUIET, Reporter
from trimoe.walk.finite import Range
from trimoe.walk.walk import usable_device

SERVE = "from trimoe.run import bench; bench.serve()"
MEASURES = ("prefill_tokens_s", "decode_tokens_s", "first_token_s")


def bench(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    prompt: int = 128,
    generate: int = 64,
    batch: int = 1,
    rounds: int = 5,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Measures `folder`, and `against` in turns with it.

    Prefill: tokens/s of one forward pass over `prompt` tokens. First token: seconds from calling generate to the first new token.
    Decode: tokens/s of the ones after it. Medians and quartiles over `rounds` (after one that is not counted); `ratio` is `folder` over
    `against`, round by round. Memory in bytes (on CUDA: torch's): before loading and after the last round what the process itself holds;
    its peak, in which the system counts files mapped while they are read. Loading is timed once, from whatever the system's file cache
    holds. `backend` concerns the models whose experts are packed. Raises UserError for what cannot be loaded or is out of range.
    """
    for name, value, least in (("prompt", prompt, 1), ("generate", generate, 2), ("batch", batch, 1), ("rounds", rounds, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; at least {least} is needed.")
    device, dtype = str(device), dtype if dtype == "auto" else dtype_name(compute_dtype(dtype))
    usable_device(device)
    job = {"prompt": prompt, "generate": generate, "batch": batch, "device": device, "dtype": dtype, "threads": torch.get_num_threads()}
    folders = [str(path) for path in (folder, against) if path is not None]
    models = [_about(path, prompt + generate) for path in folders]
    if backend != "auto" and not any(model["packed"] for model in models):
        raise UserError(f"None of {', '.join(folders)} is quantised; the backend {backend!r} runs packed experts only.")
    with contextlib.ExitStack() as stack:
        workers = []
        for model in models:
            worker = stack.enter_context(Worker())
            model |= worker.ask({**job, "model": model["model"], "backend": backend if model["packed"] else "auto"})
            reporter.say(f"{model['model']} loaded in {model['load_s']:.1f} s")
            workers.append(worker)
        for worker in workers:
            worker.ask({"do": "round"})  # warm-up
        taken: list[list[dict[str, float]]] = [[] for _ in workers]
        for number in reporter.track(range(rounds), "rounds", rounds):
            for which in range(len(workers)) if number % 2 == 0 else reversed(range(len(workers))):
                taken[which].append(workers[which].ask({"do": "round"}))
        for model, worker, values in zip(models, workers, taken, strict=True):
            model |= worker.ask({"do": "memory"})
            model["rounds"] = {name: [value[name] for value in values] for name in MEASURES}
            model |= {name: _spread(model["rounds"][name]) for name in MEASURES}
    return {
        **job, "rounds": rounds, "backend": backend, "torch": torch.__version__, "machine": _machine(device), "models": models,
        "ratio": _ratios(models[0], models[1]) if against is not None else None,
    }  # fmt: skip


def _about(path: str, needed: int) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    text = transformers5.load_config(checkpoint.folder).get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context and needed > context:
        raise UserError(f"{path} has a context of {context} tokens; prompt and generate together are {needed}.")
    size = sum(os.path.getsize(checkpoint.folder / file) for file in checkpoint.files())
    return {"model": path, "packed": checkpoint.scheme is not None, "disk_bytes": size}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    paired = {name: [a / b for a, b in zip(ours["rounds"][name], theirs["rounds"][name], strict=True)] for name in MEASURES}
    single = {name: ours[name] / theirs[name] for name in ("load_s", "disk_bytes", "peak_bytes", "resident_bytes")}
    return {name: _spread(values) for name, values in paired.items()} | single


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


# ---- the process of one model


class Worker:
    """A new Python process that answers each line of JSON with one."""

    def __enter__(self) -> Worker:
        self.process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died; the empty answer says so
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with code {self.process.wait()}; its last words stand above")
        answer = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        return answer

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.communicate()


class Runner:
    """What the process does when asked."""

    def __init__(self, job: dict[str, Any]):
        from trimoe.run.load import load

        torch.set_num_threads(job["threads"])
        self.batch, self.prompt, self.generate = job["batch"], job["prompt"], job["generate"]
        self.before_bytes = 0 if torch.device(job["device"]).type == "cuda" else _status("VmRSS")
        start = time.perf_counter()
        self.model: Any = load(job["model"], device=job["device"], dtype=job["dtype"], backend=job["backend"])
        transformers5.plain_outputs(self.model.config)
        self._wait()
        self.load_s = time.perf_counter() - start
        self.range = Range(job["model"], self.model.dtype)
        words = self.model.config.get_text_config().vocab_size
        self.ids = torch.randint(0, words, (self.batch, self.prompt), generator=torch.Generator().manual_seed(0)).to(self.model.device)

    def loaded(self) -> dict[str, Any]:
        return {
            "load_s": self.load_s,
            "before_bytes": self.before_bytes,
            "dtype": dtype_name(self.model.dtype),
            "backends": getattr(self.model, "trimoe_backends", None),
        }

    @torch.inference_mode()
    def round(self) -> dict[str, Any]:
        start = self._now()
        logits = self.model(self.ids, logits_to_keep=1).logits
        prefill = self._now() - start
        self.range.see(logits)
        self.range.check("the logits")
        ticks: list[float] = []

        def tick(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            ticks.append(self._now())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        start = self._now()
        options = dict(attention_mask=torch.ones_like(self.ids), do_sample=False, pad_token_id=0, stopping_criteria=[tick])
        self.model.generate(self.ids, min_new_tokens=self.generate, max_new_tokens=self.generate, **options)
        assert len(ticks) == self.generate
        decode = self.batch * (self.generate - 1) / (ticks[-1] - ticks[0])
        return {"prefill_tokens_s": self.ids.numel() / prefill, "decode_tokens_s": decode, "first_token_s": ticks[0] - start}

    def memory(self) -> dict[str, Any]:
        if self.model.device.type == "cuda":
            return {"peak_bytes": torch.cuda.max_memory_allocated(), "resident_bytes": torch.cuda.memory_allocated()}
        resident = _status("VmRSS")  # the kernel's high-water mark can lag a page or two behind it
        return {"peak_bytes": max(_status("VmHWM"), resident), "resident_bytes": resident}

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()


def _status(field: str) -> int:
    """From /proc; getrusage's peak is inherited from the parent process, so it serves only where there is no /proc."""
    path = Path("/proc/self/status")
    if path.exists():
        return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field))
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve() -> None:
    from transformers.utils import logging

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not reach the pipe
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    runner: Runner | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if runner is None:
                runner = Runner(question)
                answer = runner.loaded()
            else:
                answer = getattr(runner, question["do"])()
        except UserError as mistake:
            answer = {"mistake": str(mistake)}
        print(json.dumps(answer), file=answers, flush=True)
