"""The processes of a run: one, or as many as `accelerate launch` or torchrun started."""

from __future__ import annotations

import atexit
from datetime import timedelta

import torch
from accelerate import PartialState

# Hashing a data set, drawing samples and saving may take the main process longer than the usual ten minutes.
PATIENCE = timedelta(days=7)


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


def _leave_processes() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
