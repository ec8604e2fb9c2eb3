"""`python -m comfyui_gcfg.benchmarks reuse`: what Guidance Cache saves, and what it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..testkit.errors import CommandError
from .figures import table
from .options import CpuTime, Device, Threads
from .rules import FULL, RULES
from .session import Session


def reuse(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting, each with a prompt of its own.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images of a run.")] = 1,
    steps: Annotated[int, typer.Option(min=4, help="Steps of a run.")] = 25,
    sampler: Annotated[str, typer.Option(help="The solver.")] = "dpmpp_2m",
    scheduler: Annotated[str, typer.Option(help="The schedule.")] = "karras",
    setting: Annotated[
        list[str] | None, typer.Option(help="Only this setting, by its name in the JSON; repeatable.")
    ] = None,
    threads: Threads = 1,
    device: Device = "auto",
    cpu_time: CpuTime = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw time against PSNR into this file.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for reuse.json.")] = Path("output"),
    cache: Annotated[Path, typer.Option(help="Folder for the model files (0.4 GB, made once).")] = Path(
        ".cache/benchmarks"
    ),
) -> None:
    """Measure Guidance Cache on the small world's trained models: time over stock CFG, error against the full run."""
    unknown = set(setting or ()) - set(RULES)
    if unknown:
        raise CommandError(f"--setting {min(unknown)}: expected one of {', '.join(RULES)}.")
    wanted = {FULL, *(setting or RULES)}
    rules = {name: rule for name, rule in RULES.items() if name in wanted}
    session = Session.start(device, threads, cpu_time)

    from . import reuse as section  # imports ComfyUI's modules

    how = section.Sampling(steps, sampler, scheduler, batch)
    with torch.inference_mode():
        world = section.World(cache)
        measured = section.measure(world, how, seeds, section.device_clock(cpu_time), rules)
    figures = section.figures(measured, seeds)
    setting_line = {"steps": steps, "sampler": sampler, "scheduler": scheduler, "seeds": seeds, "batch": batch}
    session.store(output / "reuse.json", setting_line, figures)
    print(table(figures))
    if plot is not None:
        section.draw(measured, plot)
    print(f"\nJSON: {output / 'reuse.json'}")
