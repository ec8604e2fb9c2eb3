"""Timing calls against each other on a machine whose speed wanders."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Clock:
    """Seconds, after the device has finished what it was given.

    Attributes:
        device: that models run on.
        cpu_time: count the seconds that this process computed, so that other programs' share is left out.
    """

    device: torch.device
    cpu_time: bool = False

    def now(self) -> float:
        """Return the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.cpu_time else time.perf_counter()

    def time(self, call: Callable[[], object]) -> float:
        """Return how long one call takes."""
        start = self.now()
        call()
        return self.now() - start


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise repeated values."""
        return cls(statistics.median(values), min(values), max(values))


def rounds(names: Sequence[str], repeats: int, title: str) -> Iterator[tuple[bool, str]]:
    """Yield every name `repeats` times, after one round that is not counted: (whether it counts, name).

    A round has each name once, so that a slow minute of the machine slows all of them; every second round goes
    backwards, so that a drift within rounds favours none.
    """
    with tqdm(total=len(names) * (repeats + 1), desc=title, unit="call", leave=False) as bar:
        for number in range(repeats + 1):
            for name in names if number % 2 else reversed(names):
                yield number > 0, name
                bar.update()


def interleave(calls: Mapping[str, Callable[[], object]], repeats: int, clock: Clock, title: str) -> Times:
    """Time every call `repeats` times, in rounds."""
    times: Times = {name: [] for name in calls}
    for counts, name in rounds(list(calls), repeats, title):
        seconds = clock.time(calls[name])
        if counts:
            times[name].append(seconds)
    return times


def ratio(a: Sequence[float], b: Sequence[float]) -> Spread:
    """Return a / b, each round by itself."""
    return Spread.of([x / y for x, y in zip(a, b, strict=True)])
