"""The flags that the benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Repeats = Annotated[int, typer.Option(min=1, help="Rounds of everything that is timed.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that torch computes with on the CPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu or gpu.")]
CpuTime = Annotated[
    bool, typer.Option("--cpu-time", help="Count this process's CPU seconds: steadier on a busy machine.")
]
Profile = Annotated[
    Path | None,
    typer.Option(help="Also write a torch profiler trace (Chrome's JSON) of a stock and a guided run to this file."),
]
