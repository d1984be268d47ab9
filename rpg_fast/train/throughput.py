"""What bounds a pass over the data: how many images a second, and how long the device waited for them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DATA_BOUND = 0.05  # share of the time spent waiting from which on the data are what bounds a step


@dataclass(frozen=True)
class Throughput:
    """Figures of one pass on one process, from its first batch on; times in seconds.

    `waiting` is the part of `seconds` in which the device had finished its work and the next batch was not there yet;
    `startup`, which is not in `seconds`, is the time up to the first batch.
    """

    images: int
    seconds: float
    waiting: float
    startup: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else math.nan

    @property
    def waiting_fraction(self) -> float:
        return self.waiting / self.seconds if self.seconds > 0 else math.nan

    def __str__(self) -> str:
        return (
            f"{self.images_per_second:,.0f} images/s, {self.waiting_fraction:.1%} of the time waiting for data: "
            f"{bound(self.waiting_fraction)}; first batch after {self.startup:.1f} s"
        )


def bound(waiting: float) -> str:
    """What more speed would have to come from, by the share of the time spent waiting for data."""
    return "data bound" if waiting > DATA_BOUND else "compute bound"


class Meter:
    """Measures a pass on the clock of the device: on CUDA with events, which the host does not wait for."""

    def __init__(self, device: torch.device):
        self.device = device
        self._asked: list[_Moment] = []
        self._came: list[_Moment] = []
        self._sizes: list[int] = []

    def watch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches; a new pass forgets the one before."""
        self._asked, self._came, self._sizes = [_Moment(self.device)], [], []
        for batch in batches:
            self._came.append(_Moment(self.device))
            self._sizes.append(len(batch[1]))
            yield batch
            self._asked.append(_Moment(self.device))

    def read(self) -> Throughput:
        """The figures of the pass up to where the last batch was asked for. Waits for the device."""
        done = len(self._asked) - 1  # batches that are worked through
        if done < 1:
            return Throughput(0, 0.0, 0.0, 0.0)
        waits = (self._asked[i].until(self._came[i]) for i in range(1, done))
        return Throughput(
            images=sum(self._sizes[:done]),
            seconds=self._came[0].until(self._asked[done]),
            waiting=sum(waits),
            startup=self._asked[0].until(self._came[0]),
        )


class _Moment:
    """Now; on CUDA: when the current stream has done all that it has been given so far."""

    def __init__(self, device: torch.device):
        self.event: torch.cuda.Event | None = None
        self.time = 0.0
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.time = time.perf_counter()

    def until(self, later: _Moment) -> float:
        if self.event is None or later.event is None:
            return later.time - self.time
        later.event.synchronize()
        return self.event.elapsed_time(later.event) / 1000
