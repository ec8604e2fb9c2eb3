"""`python -m comfyui_gcfg.benchmarks`: measure the pack against ComfyUI's own nodes on one machine, in one run."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import runpy
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..testkit.comfyui import find_comfyui, uses_cpu
from ..testkit.errors import CommandError
from .bench import Bench
from .figures import Figure, table, write_json

# Each is a module of that name. What runs in a process of its own comes before this one holds models.
MAIN = {
    "imports": "importing the pack",
    "peak": "peak memory of two models",
    "clones": "a LoRA's clone and a second load",
    "ksampler": "GCFG KSampler and KSampler",
    "loads": "a run from unloaded models",
    "steps": "one guided step",
}
ASKED = {"training": "the trainer and diffusers' example", "reuse": "Guidance Cache"}
SECTIONS = ASKED | MAIN
FAMILIES = ("sd15", "sdxl")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def bench(
    section: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION", help=f"Of {', '.join(SECTIONS)}; without: {', '.join(MAIN)}."),
    ] = None,
    family: Annotated[str, typer.Option(help=f"Layout of the untrained models: {' or '.join(FAMILIES)}.")] = "sd15",
    small: Annotated[bool, typer.Option("--small", help="A few of the layout's blocks in place of all.")] = False,
    size: Annotated[int | None, typer.Option(help="Width and height in pixels; 256, or 128 with --small.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images at once; 1, in training 2.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of everything that is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count the process's CPU seconds: steadier on a busy machine.")
    ] = False,
    json: Annotated[Path, typer.Option(help="File for the figures.")] = Path("output/benchmarks.json"),
) -> None:
    """Measure the pack beside ComfyUI's own nodes; COMFYUI_PATH names another ComfyUI than the pip-packaged one.

    Model files are made once, in .cache/benchmarks: 3.4 GB of SD1.5, 9.2 of SDXL, 0.1 with --small; 2.1 for training.
    """
    wanted = section or list(MAIN)
    for name in wanted:
        if name not in SECTIONS:
            raise CommandError(f"section {name}: expected one of {', '.join(SECTIONS)}.")
    if family not in FAMILIES:
        raise CommandError(f"--family {family}: expected {' or '.join(FAMILIES)}.")
    size = size if size is not None else 128 if small else 256
    if size < 64 or size % 64:
        raise CommandError(f"--size {size}: expected a positive multiple of 64, as SD1.5's latents need; round it.")
    cpu, started, load = uses_cpu(device), time.monotonic(), _load()
    if cpu_time and not cpu:
        raise CommandError("--cpu-time: the models run on a GPU, whose time it would not count; leave it out.")
    layout = family if small else f"{family}-full"
    work = Bench(layout, size, batch, repeats, cpu, cpu_time, threads, output=str(json.parent))
    work.start()
    logging.getLogger().setLevel(logging.WARNING)
    setting = {"sections": " ".join(wanted), **_setting(work), "load": load}
    print(", ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    found: dict[str, list[Figure]] = {}
    with torch.inference_mode():
        for name, title in SECTIONS.items():
            if name in wanted:
                found[name] = list(importlib.import_module(f".{name}", __package__).figures(work))
                print(f"\n{table(title, found[name])}", flush=True)
    write_json(json, setting | {"seconds": round(time.monotonic() - started)}, found)
    print(f"\nJSON: {json}")


def _setting(bench: Bench) -> dict[str, Any]:
    """What is measured, and on what."""
    return {
        "layout": bench.layout,
        "size": bench.size,
        "batch": bench.batch or "default",
        "repeats": bench.repeats,
        "weights": "bf16" if bench.flags else "as ComfyUI takes them",
        "comfyui": _version(),
        "torch": torch.__version__,
        "device": _device_name(bench.clock.device),
        "cores": os.cpu_count(),
        "threads": bench.threads,
        "clock": "cpu" if bench.cpu_time else "wall",
    }


def _version() -> str:
    tree = find_comfyui()
    if tree is None:
        return f"{importlib.metadata.version('comfyui')} (pip-packaged)"
    return str(runpy.run_path(str(tree / "comfyui_version.py"))["__version__"])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{device.type} ({name})"


def _load() -> float | None:
    """Of other programs."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
