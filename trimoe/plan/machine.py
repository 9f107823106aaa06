"""How fast this machine is: a few constants, measured in about two seconds and kept for next time.

They lie in ~/.cache/trimoe (or XDG_CACHE_HOME), one file for each machine, number of threads, torch version, device and dtype. Nothing that
is measured here gets into a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROWS = (4, 32, 256, 2048)  # tokens of a matrix product: few of them are bound by reading the weights
SIDE = 1024  # of the weights it is measured with
FACTORED = 512  # side of the matrices that are factored: from here on a cubed side takes about as long as one of several thousand
SPEND = 0.12  # seconds for each constant
FREE = 0.9  # of a processor: with less, other work is measured, too
Clock = Callable[[], float]


@dataclass(frozen=True)
class Rates:
    """What is done in a second: `matmul[i]` FLOPs of products of ROWS[i] tokens, `double` FLOPs of float64 products; cubed sides n^3 of `eigh`,
    `eigvalsh`, `cholesky`, `solve` in float64; `memory` bytes read and written by elementwise work; `read`, `write` bytes of files (from the page
    cache; flushed to the disk); and `ops`, small operations (about the time that Python takes for each). `free`: which share of its threads'
    processors this process got meanwhile."""

    matmul: tuple[float, ...]
    double: float
    eigh: float
    eigvalsh: float
    cholesky: float
    solve: float
    memory: float
    read: float
    write: float
    ops: float
    free: float = 1.0

    @property
    def busy(self) -> bool:
        return self.free < FREE

    def seconds(self, kind: str, amount: float, rows: float = 0.0) -> float:
        return amount / (self.product(rows) if kind == "matmul" else float(getattr(self, kind)))

    def product(self, rows: float) -> float:
        """FLOP/s of a product of so many tokens: between two measured numbers, the logarithm of the speed in proportion to the tokens."""
        for (low, slow), (high, fast) in zip(
            zip(ROWS, self.matmul, strict=True), zip(ROWS[1:], self.matmul[1:], strict=True), strict=False
        ):
            if rows <= high:
                place = max(0.0, min(1.0, (max(rows, 1) / low - 1) / (high / low - 1)))
                return slow * (fast / slow) ** place if rows >= low else slow * max(rows, 1) / low
        return self.matmul[-1]


def rates(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rates:
    """This machine's, from the cache or measured now; kept only if it was not busy with something else."""
    path = _file(device, dtype)
    if path is None:
        return measure(device, dtype)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Rates(**{**known, "matmul": tuple(known["matmul"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass
    found = measure(device, dtype)
    if found.busy:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(found)), encoding="utf-8")
        part.replace(path)
    except OSError:
        pass  # a home that cannot be written to: measured again next time
    return found


def _file(device: str, dtype: torch.dtype) -> Path | None:
    """Where they are kept; None where there is no home to keep them in."""
    about = (
        platform.node(), platform.machine(), _processor(), torch.__version__, torch.get_num_threads(), device, _accelerator(device), str(dtype), ROWS, FACTORED,
    )  # fmt: skip
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # HOME is unset and the user has no entry that says it
        return None
    return base / "trimoe" / f"speed-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"


def _accelerator(device: str) -> str:
    """A GPU's name: another one in the same machine has another speed."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


@torch.no_grad()
def measure(device: str = "cpu", dtype: torch.dtype = torch.float32, clock: Clock = time.perf_counter) -> Rates:
    """Each constant as the best of a few repetitions within SPEND seconds."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weight, small = made(SIDE, SIDE), made(64, 64)
    square = made(FACTORED, FACTORED, dtype=torch.float64)
    spd = square @ square.T + FACTORED * torch.eye(FACTORED, dtype=torch.float64, device=device)
    large = made(1 << 22)
    products = []

    def best(work: Callable[[], object]) -> float:
        return _best(work, device, clock)

    for rows in ROWS:
        given = made(rows, SIDE)
        products.append(2 * rows * SIDE**2 / best(lambda given=given: given @ weight))  # type: ignore[misc]
    read, write = _files(clock)
    cube = FACTORED**3
    return Rates(
        tuple(products), 2 * cube / best(lambda: square @ square), cube / best(lambda: torch.linalg.eigh(spd)),
        cube / best(lambda: torch.linalg.eigvalsh(spd)), cube / best(lambda: torch.linalg.cholesky(spd)),
        cube / best(lambda: torch.linalg.solve(spd, square)),
        2 * large.nbytes / best(lambda: large.mul(2.0)), read, write, 1 / best(lambda: small.add(small)), _free(),
    )  # fmt: skip


def _free(clock: Clock = time.perf_counter, own: Clock = time.process_time) -> float:
    """The share of a processor that each of torch's threads gets when all of them want all of one (products keep them all at work)."""
    square = torch.ones(SIDE, SIDE)
    start, used = clock(), own()
    while clock() - start < SPEND:
        square @ square
    return min(1.0, (own() - used) / (clock() - start) / torch.get_num_threads())


def _best(work: Callable[[], object], device: str, clock: Clock) -> float:
    """Seconds of one call."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.startswith("cuda") else lambda: None
    work()
    wait()
    best, begun = float("inf"), clock()
    while clock() - begun < SPEND:
        start = clock()
        work()
        wait()
        best = min(best, clock() - start)
    return max(best, 1e-9)


def _files(clock: Clock, size: int = 32 << 20) -> tuple[float, float]:
    """Bytes a second of a temporary file written and flushed to the disk, and read back."""
    block = bytes(size)
    with tempfile.TemporaryFile() as file:
        start = clock()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = clock()
        file.seek(0)
        file.readinto(bytearray(size))  # type: ignore[attr-defined]
        return size / (clock() - written), size / (written - start)
