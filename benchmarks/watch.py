"""The time that model calls take, told apart from the time around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .timing import Clock


@dataclass
class Watch:
    """What the models were asked: the calls as functions, to be made again, and the seconds they took.

    Attributes:
        clock: what to time with.
        recording: whether calls are kept.
        calls: the recorded calls.
        batches: their batch sizes.
        seconds: spent in the models so far.
    """

    clock: Clock
    recording: bool = False
    calls: list[Callable[[], Tensor]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def around(self, apply_model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `apply_model`, watched."""

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.recording:
                self.calls.append(lambda: watched(x, *args, **kwargs))
                self.batches.append(x.shape[0])
            start = self.clock.now()
            out = apply_model(x, *args, **kwargs)
            self.seconds += self.clock.now() - start
            return out

        return watched

    def record(self, call: Callable[[], object]) -> None:
        """Keep the model calls that this call makes."""
        self.recording = True
        call()
        self.recording = False

    def repeat(self) -> None:
        """Make the recorded model calls again, and nothing else."""
        for call in self.calls:
            call()

    def split(self, call: Callable[[], object]) -> Split:
        """Time a call and tell what of it the models took."""
        before = self.seconds
        total = self.clock.time(call)
        return Split(self.seconds - before, total - (self.seconds - before))


@dataclass(frozen=True)
class Split:
    """Seconds of one call: within the models and around them."""

    within: float
    around: float


@contextmanager
def watching(models: Sequence[Any], clock: Clock) -> Iterator[Watch]:
    """Watch the models within the `with` block."""
    watch = Watch(clock)
    with calls_through(watch.around, models):
        yield watch


@contextmanager
def calls_through(wrap: Callable[[Any], Any], models: Sequence[Any]) -> Iterator[None]:
    """Wrap the models' `apply_model` within the `with` block."""
    unique = {id(model): model for model in models}.values()
    for model in unique:
        model.apply_model = wrap(model.apply_model)
    try:
        yield
    finally:
        for model in unique:
            del model.apply_model  # the class's own again
