"""Timing calls against each other on a machine whose speed wanders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")


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


def ratio(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return a / b, each round by itself."""
    return [x / y for x, y in zip(a, b, strict=True)]


def interleaved(
    calls: Mapping[str, Callable[[int], T]], repeats: int, title: str, warm_up: bool = True
) -> dict[str, list[T]]:
    """Make every call once per round, and return what each gave, by round.

    A round has each call once, so that a slow minute of the machine slows all of them; every second round goes
    backwards, so that a drift within rounds favours none.

    Args:
        calls: by name; each is given the number of its round, from 0.
        repeats: rounds that count.
        title: of the progress bar.
        warm_up: make another round before them, number 0 too, that does not count.
    """
    found: dict[str, list[T]] = {name: [] for name in calls}
    with tqdm(total=len(calls) * (repeats + warm_up), desc=title, unit="call", leave=False) as bar:
        for number in range(-int(warm_up), repeats):
            for name in reversed(list(calls)) if number % 2 else calls:
                result = calls[name](max(number, 0))
                if number >= 0:
                    found[name].append(result)
                bar.update()
    return found


@dataclass(frozen=True)
class Split:
    """Seconds of one call: within the models and around them."""

    within: float
    around: float

    @property
    def whole(self) -> float:
        """Both."""
        return self.within + self.around


@dataclass
class Watch:
    """The calls that models were asked for.

    Attributes:
        clock: what to time with.
        batches: their batch sizes.
        seconds: spent in them so far.
    """

    clock: Clock
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def split(self, call: Callable[[], object]) -> Split:
        """Time a call and tell what of it the models took."""
        before = self.seconds
        total = self.clock.time(call)
        return Split(self.seconds - before, total - (self.seconds - before))

    def around(self, apply_model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `apply_model`, watched."""

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.batches.append(len(x))
            start = self.clock.now()
            out = apply_model(x, *args, **kwargs)
            self.seconds += self.clock.now() - start
            return out

        return watched


@contextmanager
def watching(models: Sequence[Any], clock: Clock) -> Iterator[Watch]:
    """Watch the models' `apply_model` within the `with` block."""
    watch = Watch(clock)
    unique = {id(model): model for model in models}.values()
    for model in unique:
        model.apply_model = watch.around(model.apply_model)
    try:
        yield watch
    finally:
        for model in unique:
            del model.apply_model  # the class's own again
