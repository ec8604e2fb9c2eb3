"""Commands in processes of their own: forked from one that has the libraries already, or as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from unittest import mock

QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


def starter(main: Callable[[Sequence[str]], object], preload: Sequence[str]) -> Callable[..., BaseProcess]:
    """Return a function that starts a command's `main` with arguments, each time in a process of its own.

    Args:
        main: takes the arguments.
        preload: modules that all these processes have from the start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with mock.patch.dict(os.environ, QUIET):
        ensure_running()

    def begin(*arguments: object) -> BaseProcess:
        process = context.Process(target=main, args=([str(each) for each in arguments],))
        process.start()
        return process

    return begin


def torchrun(*arguments: object, module: str = "comfyui_gcfg.command") -> subprocess.Popen[str]:
    """Start a module in two processes on the CPU, with gloo between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **QUIET},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
