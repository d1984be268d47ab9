"""Training in several processes, as `torchrun` starts them: who leads, what is shared, and whether all still agree."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .config import Stopped, UserError

T = TypeVar("T")

PROTOCOL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets
MIXER = -0x61C8864680B583EB  # 2^64 / golden ratio, odd, as a signed number
SECONDS_TO_REPORT = 2.0  # in which the processes that are left say so, after one was lost
LOST = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out", "timed out")


class LostProcess(UserError):  # noqa: N818 (named for what happened)
    """Another process of the run has ended. The text is empty on all ranks but the one that tells it."""


@dataclass(frozen=True)
class Team:
    """The processes that train one network together; by default there is only this one. `local_world` of them run on
    this machine.

    Collectives of tensors on the CPU run on gloo, those on CUDA on NCCL; every rank has to call them at the same point.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Store | None = None
    local_world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def lead(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, which alone runs it, on every rank; a `UserError` is raised on every one."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank; all ranks run it, and a `UserError` of one is raised on every one."""
        if self.world == 1:
            return action()
        result: list[T] = []
        error = ""
        try:
            result.append(action())
        except UserError as found:
            error = str(found)
        errors = [text for text in self.gather(error) if text]
        if errors:
            raise UserError(errors[0])
        return result[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank. The hosts wait for each other here, the devices do not."""
        if self.world == 1:
            return flag
        found = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks; for one process `tensor` itself."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def copy_buffers(self, model: nn.Module) -> None:
        """Everyone takes over rank 0's buffers, as the running statistics of norms."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def check_agreement(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Compares what should be equal on all ranks by 64 bits a tensor.

        Args:
            tensors: by what they are, e.g. "the weights of conv1". `where`: for the message, e.g. "step 1000".

        Raises:
            UserError: on every rank, if some rank differs. It names the rank and the first tensor.
        """
        if self.world == 1:
            return
        mine = fingerprints(tensors.values()).cpu()  # [n]
        table = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(table, mine)
        found = differences(list(tensors), torch.stack(table).tolist())
        if found:
            raise UserError(f"the processes no longer agree at {where}: {found}")

    def explain_loss(self, error: Exception, where: str) -> str | None:
        """For an `error` of a collective because a process has ended: what to tell, which is an empty text on all ranks
        but one of those that are left. None: the error has another cause."""
        text = str(error)
        if self.world == 1 or not (isinstance(error, dist.DistError) or any(sign in text for sign in LOST)):
            return None
        missing, first = self._missing()
        if not first:
            return ""
        named = f"rank {', '.join(map(str, missing))}" if missing else "one of the processes"
        return f"{named} of {self.world} has ended at {where}, so the run ends"

    def _missing(self) -> tuple[list[int], bool]:
        """The ranks that do not answer any more, and whether this one is the first to ask."""
        try:
            assert self.store is not None
            first = self.store.add("lost", 1) == 1
            self.store.set(f"left/{self.rank}", "")
            if not first:
                return [], False
            time.sleep(SECONDS_TO_REPORT)
            silent = [rank for rank in range(self.world) if not self.store.check([f"left/{rank}"])]
            return [rank for rank in silent if not lives(self.store.get(f"process/{rank}").decode())], True
        except RuntimeError:  # the store has ended with its process
            return [], True


ALONE = Team()


@contextmanager
def join() -> Iterator[Team]:
    """The team that torchrun has started this process for, or one of this process alone.

    Raises:
        UserError: the other processes cannot be reached.
    """
    if not launched():
        yield Team()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    try:
        store, rank, world = next(rendezvous("env://"))
        store.set(f"process/{rank}", f"{os.getpid()} {socket.gethostname()}")
        dist.init_process_group(store=PrefixStore("group", store), rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot reach the other processes: {str(error).splitlines()[0]}") from error
    together = False
    try:
        yield Team(rank, world, local_rank, store, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        together = True
    except Stopped:
        together = True
        raise
    finally:
        if together:  # else the others may wait for this process, which only its end tells them
            dist.destroy_process_group()


def lives(process: str) -> bool:
    """Whether a process, given as its number and its machine, is known to run: it may wait for a neighbour, and not
    know yet that another has ended. Of other machines nothing is known."""
    number, _, machine = process.partition(" ")
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return machine == socket.gethostname() and state not in ("Z", "X")  # ended, and not yet taken note of


def launched() -> bool:
    """Whether torchrun has started this process."""
    return all(name in os.environ for name in PROTOCOL)


def prints_errors() -> bool:
    """Whether this process tells what all of them find out alike."""
    return not launched() or os.environ["RANK"] == "0"


def end_process(status: int) -> int:
    """Returns `status`, but ends a process that torchrun has started at once: DistributedDataParallel keeps the threads
    of gloo and NCCL beyond the process group, and Python's shutdown, which they may meet, then aborts or hangs."""
    if launched():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    return status


def fingerprints(tensors: Any) -> Tensor:
    """64 bits of the content of each tensor, int64 [n] on their device: every word times an odd number of its own, so
    that a single difference always shows.

    Equivalent to: ``((words + 1) * ((index + 1) * MIXER | 1)).sum()`` in arithmetic modulo 2^64.
    """
    found = []
    for tensor in tensors:
        words = tensor.detach().contiguous().view(-1).view(torch.uint8)
        size = next(n for n in (4, 2, 1) if words.numel() % n == 0)
        words = words.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]).to(torch.int64)
        odd = torch.arange(1, len(words) + 1, device=words.device).mul_(MIXER).bitwise_or_(1)
        found.append(words.add_(1).mul_(odd).sum())
    return torch.stack(found)


def differences(names: list[str], table: list[list[int]]) -> str:
    """Which ranks differ from most others, and where first; empty where none does.

    Args:
        table: [ranks][names].
    """
    usual = [Counter(column).most_common(1)[0][0] for column in zip(*table, strict=True)]  # a tie: the lowest rank's
    told = []
    for rank, row in enumerate(table):
        where = [name for name, got, wanted in zip(names, row, usual, strict=True) if got != wanted]
        if where:
            more = f" and {len(where) - 1} more" if len(where) > 1 else ""
            told.append(f"rank {rank} differs in {where[0]}{more}")
    return "; ".join(told)
