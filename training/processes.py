"""The processes of a run: one, or as many as `accelerate launch` or torchrun started."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..gcfg.errors import GuidanceError

# Hashing a data set, drawing samples and saving may take the main process longer than the usual ten minutes.
PATIENCE = timedelta(days=7)

T = TypeVar("T")


def only_cpu() -> bool:
    """Tell whether there is no device but the CPU; accelerate joins processes there only when it is told so."""
    return not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())


def join_processes() -> PartialState:
    """Join the other processes of the run, if there are any, until this one exits; may be called again."""
    state = PartialState(cpu=only_cpu(), timeout=PATIENCE)
    if state.use_distributed:
        atexit.unregister(_leave_processes)
        atexit.register(_leave_processes)  # torch's threads abort a process that exits without it
    return state


def from_main(function: Callable[[], T]) -> T:
    """Run a function in the main process only; all processes get its result, or its error.

    Raises: GuidanceError: in every process, what the function raised in the main one.
    """
    shared: list[T | str | None] = [None, None]
    if PartialState().is_main_process:
        try:
            shared[0] = function()
        except GuidanceError as error:
            shared[1] = str(error)
    broadcast_object_list(shared)
    result, complaint = shared
    if complaint is not None:
        raise GuidanceError(str(complaint))
    return result  # type: ignore[return-value]


@contextmanager
def alone_in(folder: Path, source: str) -> Iterator[None]:
    """Keep other runs out of a folder within the `with` block; the system opens it again when the process dies.

    Raises: GuidanceError: if another run is at work there; `source` names the setting.
    """
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise GuidanceError(
                f"{source} {str(folder)!r} is in use by another gcfg command, expected to be the only one; wait for "
                "it, or name another folder."
            ) from error

    from_main(acquire)  # the main process holds the folder for all
    try:
        yield
    finally:
        lock.release()


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yield a list that gets the first SIGTERM or Ctrl-C as a request to stop; a second one acts as ever."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        restore()


def _leave_processes() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
