"""The benchmark command: one run, one machine, the same models; a table of ratios, and the same as JSON."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..demo.command import uses_cpu
from ..demo.errors import DemoError
from ..demo.server import find_comfyui
from .figures import Figure, table, write_json
from .files import make_files
from .inprocess import import_comfyui
from .training import training

if TYPE_CHECKING:  # importing it takes a running ComfyUI
    from .bench import Bench

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    small: Annotated[bool, typer.Option("--small", help="The demo's small UNet, not all of SD1.5.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of everything that is timed.")] = 3,
    size: Annotated[
        int | None, typer.Option(help="Width and height in pixels; 256, or 128 for the small UNet.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a KSampler's run.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count this process's CPU seconds: steadier on a busy machine.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for benchmarks.json.")] = Path("output"),
    cache: Annotated[Path, typer.Option(help="Folder for the model files (3.4 GB, made once).")] = Path(
        ".cache/benchmarks"
    ),
) -> None:
    """Measure the pack against its peers; COMFYUI_PATH names another ComfyUI than the pip-packaged one.

    The trainer has a benchmark of its own: `training --help`.
    """
    if context.invoked_subcommand:
        return
    started = time.monotonic()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # of other programs
    size = size if size is not None else 128 if small else 256
    if size < 64 or size % 64:
        raise DemoError(f"--size {size}: expected a positive multiple of 64, as SD1.5's latents need; round it.")
    tree, cpu = find_comfyui(), uses_cpu(device)
    if cpu_time and not cpu:
        raise DemoError("--cpu-time: the models run on a GPU, whose time it would not count; leave it out.")
    family = "sd15" if small else "sd15-full"
    print(f"Model files in {cache} ...", flush=True)
    files = make_files(cache, family)
    comfy = import_comfyui(tree, cpu)
    logging.getLogger().setLevel(logging.WARNING)
    comfy.utils.PROGRESS_BAR_ENABLED = False  # the stock sampler has none here in some versions; then nor have we

    from .bench import Bench  # imports ComfyUI's modules, as all sections do

    torch.set_num_threads(threads)
    work = Bench(files, family, size, steps, repeats, cpu_time)
    figures: list[Figure] = []
    with torch.inference_mode():
        for found in _sections(work, tree, cpu):
            figures += found
    setting = {**_machine(tree, work), "clock": "cpu" if cpu_time else "wall", "load": load}
    setting |= {"size": size, "steps": steps, "repeats": repeats, "seconds": round(time.monotonic() - started)}
    write_json(output / "benchmarks.json", setting, figures)
    print("\n" + ", ".join(f"{key} {value}" for key, value in setting.items()) + "\n")
    print(table(figures))
    print(f"\nJSON: {output / 'benchmarks.json'}")


def _sections(work: Bench, tree: Path | None, cpu: bool) -> Iterator[list[Figure]]:
    """The sections in an order that needs little memory: the second copies of the prior before the concept model."""
    from . import imports, ksampler, loads, null_text, separation, steps

    yield imports.figures(tree, cpu, work.repeats)
    yield separation.figures(work)
    yield loads.figures(work)
    yield steps.figures(work)
    yield ksampler.figures(work)
    yield null_text.figures(work)


def _machine(tree: Path | None, work: Bench) -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "comfyui": _version(tree),
        "torch": torch.__version__,
        "device": device_name(work.clock.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in work.prior.model.diffusion_model.parameters()),
        "dtype": str(work.prior.model_dtype()),
    }


def _version(tree: Path | None) -> str:
    if tree is None:
        return f"{importlib.metadata.version('comfyui')} (pip-packaged)"
    return str(runpy.run_path(str(tree / "comfyui_version.py"))["__version__"])


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{device.type} ({name})"


app.command("training")(training)
