"""Several processes on one job, started by torchrun. The only file that knows torch.distributed.

Everything else talks to a `Team`. The base class is the team of one: its methods hand back what they are given.
What is said between processes on CPU tensors goes by gloo, what is said on CUDA tensors by NCCL.
"""

from __future__ import annotations

import atexit
import io
import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from trimoe.errors import UserError

Value = TypeVar("Value")
Item = TypeVar("Item")
PATIENCE = timedelta(hours=4)  # one process may write a whole layer while the others wait for it


class Elsewhere(UserError):
    """The user's mistake that the main process has met and says."""


def launched() -> bool:
    """Whether torchrun started this process among others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is the one that prints and writes."""
    return not launched() or os.environ["RANK"] == "0"


class Team:
    """A team of one process. `rank` counts from 0; the main process, rank 0, reads the journal and writes."""

    rank, count = 0, 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def here(self) -> int:
        """How many of the processes are on this machine."""
        return 1

    def place(self, device: str) -> str:
        """The device of this process where `device` was asked for."""
        return device

    def span(self, length: int, rank: int | None = None) -> slice:
        """A process's own stretch (this one's by default) of so many things in a row; stretches differ by one at most."""
        rank = self.rank if rank is None else rank
        return slice(rank * length // self.count, (rank + 1) * length // self.count)

    def from_main(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the main process, for all; a UserError there is one everywhere."""
        return work()

    def after_main(self, work: Callable[[], Value]) -> Value:
        """Each process does `work`, the others once the main process has done it without a UserError."""
        return work()

    def everyone(self, value: Value) -> list[Value]:
        """Every process's value in order of rank; tensors that crossed are on the CPU."""
        return [value]

    def shared(
        self, items: Sequence[Item], work: Callable[[Item], Value], track: Callable[[Sequence[Item]], Iterable[Item]] = iter
    ) -> list[Value]:
        """work(item) of all items in order, each done by one process; `track` is shown those that are this one's."""
        mine = [work(item) for item in track(items[self.rank :: self.count])]
        turns = self.everyone(mine)
        return [turns[place % self.count][place // self.count] for place in range(len(items))]

    def fold(self, parts: Sequence[Value], add: Callable[[Value, Value], Value]) -> Value:
        """All processes' parts added up from the first of rank 0 to the last of the last rank, one after the other as one process
        would: the same sum to the last bit."""
        return reduce(add, parts)

    def fill(self, whole: torch.Tensor, spans: Sequence[slice]) -> None:
        """Make `whole` complete in place: rank r has the rows spans[r] of it right."""

    def exchanged(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """rows[r] goes to rank r; what comes in from all, in order of rank, in one tensor."""
        return rows[0]


ALONE = Team()


@contextmanager
def team(device: str = "cpu") -> Iterator[Team]:
    """This process's team, for as long as the job takes: all that torchrun started, or this one alone."""
    if not launched():
        yield ALONE
        return
    one = _Processes(_group(device))
    try:
        yield one
        one.everyone(None)  # nobody leaves before all is done; where something else was raised nobody waits
    except UserError as mistake:
        raise one.ended_by(mistake) from mistake


_groups: list[dist.Store] = []  # of this process so far; the last one may still be open


_lent: list[dist.Store] = []  # one for each time that a group of somebody else's was used


def _group(device: str) -> dist.Store:
    """What the current group has in common, beside its messages; there is one group until a mistake ends it. The next has keys of its own,
    for of the same name it would meet what the first left behind."""
    if dist.is_initialized() and not _groups:  # somebody else's, accelerate's perhaps: it is used, and left open
        _lent.append(dist.PrefixStore(f"trimoe-lent-{len(_lent)}", dist.distributed_c10d._get_default_store()))
        return _lent[-1]
    if not dist.is_initialized():
        cuda = device.startswith("cuda") and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if not _groups:
            atexit.register(_close)
            first, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
            _groups.append(first)
        store = dist.PrefixStore(f"trimoe-{len(_groups)}", _groups[0])
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
        _groups.append(store)
    return _groups[-1]


def _close() -> None:
    if dist.is_initialized() and _groups:
        dist.destroy_process_group()


class _Processes(Team):
    """The processes of the current group. `store`: where one leaves word that ends without having been waited for."""

    def __init__(self, store: dist.Store) -> None:
        self.rank, self.count, self.store = dist.get_rank(), dist.get_world_size(), store

    @property
    def here(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def place(self, device: str) -> str:
        if device.startswith("cuda:"):
            raise UserError(f"Several processes take one GPU each; give --device cuda, not {device}.")
        return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if (mistake := self._left_word()) is not None:
                error.__traceback__ = None  # see ended_by
                raise mistake from None
            about = (str(error).splitlines() or ["no reason given"])[0][:160]
            raise ConnectionError(
                f"process {self.rank} of {self.count} lost the others ({about}); see what ended first. The same command resumes."
            ) from error

    def ended_by(self, mistake: UserError) -> UserError:
        """Ends the group in all processes, wherever they are: who waits for this one loses it, and finds the mistake. What is to be raised
        here: the mistake in the main process, which says it, and elsewhere that it is said there, once the main process has left too."""
        if not isinstance(mistake, Elsewhere):
            self.store.compare_set("mistake", "", pickle.dumps(mistake).hex())
        traceback.clear_frames(mistake.__traceback__)  # which hold the group open after its end where this process waited for another
        _close()
        if self.main:
            self.store.set("left", "")
            return mistake
        with suppress(RuntimeError):  # the main process is gone, and the store with it
            self.store.wait(["left"], PATIENCE)
        return Elsewhere(str(mistake))

    def _left_word(self) -> UserError | None:
        """The mistake that ended another process, as it is raised here."""
        with suppress(RuntimeError):
            if self.store.check(["mistake"]):
                mistake: UserError = pickle.loads(bytes.fromhex(self.store.get("mistake").decode()))
                return mistake if self.main else Elsewhere(str(mistake))
        return None

    def from_main(self, work: Callable[[], Value]) -> Value:
        if not self.main:
            value, mistake = self._broadcast(None, 0)
            if mistake is not None:
                raise Elsewhere(mistake)
            return value
        try:
            value = work()
        except UserError as error:
            self._broadcast((None, str(error)), 0)
            raise
        self._broadcast((value, None), 0)
        return value

    def after_main(self, work: Callable[[], Value]) -> Value:
        if self.main:
            kept: list[Value] = []
            self.from_main(lambda: kept.append(work()))
            return kept[0]
        self.from_main(lambda: None)
        return work()

    def everyone(self, value: Value) -> list[Value]:
        return [self._broadcast(value, rank) for rank in range(self.count)]

    def fold(self, parts: Sequence[Value], add: Callable[[Value, Value], Value]) -> Value:
        before = [self._receive(self.rank - 1)] if self.rank else []
        total = reduce(add, [*before, *parts])
        if self.rank < self.count - 1:
            self._send(total, self.rank + 1)
        return self._broadcast(total, self.count - 1)

    def fill(self, whole: torch.Tensor, spans: Sequence[slice]) -> None:
        assert whole.is_contiguous()
        if whole.is_cuda:  # NCCL would wait for one that has ended; gloo says so
            self.everyone(None)
        with self.together():
            for rank, span in enumerate(spans):
                part = whole.detach()[span]
                if part.numel():
                    dist.broadcast(part.flatten().view(torch.uint8), src=rank)

    def exchanged(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        sizes = self.everyone([len(part) for part in rows])
        coming = [theirs[self.rank] for theirs in sizes]
        given = torch.cat(list(rows)).contiguous()
        taken = given.new_empty(sum(coming), *given.shape[1:])
        with self.together():  # as bytes: not every backend knows every dtype
            dist.all_to_all_single(taken.view(torch.uint8), given.view(torch.uint8), coming, [len(part) for part in rows])
        return taken

    # ---- values as bytes

    def _broadcast(self, value: Any, source: int) -> Any:
        body = _bytes(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(body)])
        with self.together():
            dist.broadcast(size, src=source)
            body = body if self.rank == source else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(body, src=source)
        return _value(body)

    def _send(self, value: Any, rank: int) -> None:
        body = _bytes(value)
        with self.together():
            dist.send(torch.tensor([len(body)]), rank)
            dist.send(body, rank)

    def _receive(self, rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        with self.together():
            dist.recv(size, rank)
            body = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(body, rank)
        return _value(body)


class _Pickler(pickle.Pickler):
    """Tensors as what they show, on the CPU: not their whole storage, and not the sender's device."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().flatten()
        return _tensor, (flat.view(torch.uint8).numpy(), value.dtype, tuple(value.shape))


def _tensor(raw: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype).view(shape)


def _bytes(value: Any) -> torch.Tensor:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _value(body: torch.Tensor) -> Any:
    return pickle.loads(body.numpy().data)
