"""The benchmark command: one run, one machine, the same models; a table of ratios, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from .figures import Figure, table
from .files import make_files
from .matrix_command import matrix
from .options import CpuTime, Device, Profile, Repeats, Threads
from .reuse_command import reuse
from .session import Session, check_size
from .training import training

if TYPE_CHECKING:  # importing it takes a running ComfyUI
    from .bench import Bench

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    small: Annotated[bool, typer.Option("--small", help="The demo's small UNet, not all of SD1.5.")] = False,
    repeats: Repeats = 3,
    size: Annotated[
        int | None, typer.Option(help="Width and height in pixels; 256, or 128 for the small UNet.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a KSampler's run.")] = 2,
    threads: Threads = 1,
    device: Device = "auto",
    cpu_time: CpuTime = False,
    profile: Profile = None,
    output: Annotated[Path, typer.Option(help="Folder for benchmarks.json.")] = Path("output"),
    cache: Annotated[Path, typer.Option(help="Folder for the model files (3.4 GB, made once).")] = Path(
        ".cache/benchmarks"
    ),
) -> None:
    """Measure the pack against its peers; COMFYUI_PATH names another ComfyUI than the pip-packaged one.

    Every combination of models against stock guidance: `matrix --help`. The trainer: `training --help`.
    """
    if context.invoked_subcommand:
        return
    size = size if size is not None else 128 if small else 256
    check_size(size)
    family = "sd15" if small else "sd15-full"
    print(f"Model files in {cache} ...", flush=True)
    files = make_files(cache, family)
    session = Session.start(device, threads, cpu_time)

    from .bench import Bench  # imports ComfyUI's modules, as all sections do

    work = Bench(files, family, size, steps, repeats, cpu_time)
    figures: list[Figure] = []
    with torch.inference_mode():
        for found in _sections(work, session, profile):
            figures += found
    setting = {
        "parameters": sum(p.numel() for p in work.prior.model.diffusion_model.parameters()),
        "dtype": str(work.prior.model_dtype()),
        "size": size,
        "steps": steps,
        "repeats": repeats,
    }
    session.store(output / "benchmarks.json", setting, figures)
    print(table(figures))
    print(f"\nJSON: {output / 'benchmarks.json'}")


def _sections(work: Bench, session: Session, profile: Path | None) -> Iterator[list[Figure]]:
    """The sections in an order that needs little memory: the second copies of the prior before the concept model."""
    from . import imports, ksampler, loads, null_text, profiling, separation, steps

    yield imports.figures(session.tree, session.cpu, work.repeats)
    yield separation.figures(work)
    yield loads.figures(work)
    yield steps.figures(work)
    yield ksampler.figures(work)
    yield null_text.figures(work)
    if profile is not None:
        yield profiling.figures(work, profile)


app.command("matrix")(matrix)
app.command("reuse")(reuse)
app.command("training")(training)
