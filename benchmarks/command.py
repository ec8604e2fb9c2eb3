"""The benchmark command: one run, one machine, the same models; a table of ratios, and the same as JSON."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from ..testkit.errors import CommandError
from .figures import Figure, table
from .files import make_files
from .matrix_command import matrix
from .options import CpuTime, Device, Profile, Repeats, Threads
from .reuse_command import reuse
from .session import Session, check_size
from .training import training

if TYPE_CHECKING:  # importing it takes a running ComfyUI
    from .bench import Bench

# In an order that needs little memory: what runs in a process of its own first, then the second copies of the prior.
SECTIONS = ("imports", "peak", "separation", "loads", "steps", "ksampler", "null_text", "backends")
SLOW = {"peak", "backends"}  # only where they are asked for

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
    section: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this one of {', '.join(SECTIONS)}; repeatable. Without: all but peak and backends."),
    ] = None,
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
    wanted = section or [name for name in SECTIONS if name not in SLOW]
    unknown = sorted(set(wanted) - set(SECTIONS))
    if unknown:
        raise CommandError(f"--section {unknown[0]}: expected one of {', '.join(SECTIONS)}.")
    size = size if size is not None else 128 if small else 256
    check_size(size)
    family = "sd15" if small else "sd15-full"
    print(f"Model files in {cache} ...", flush=True)
    files = make_files(cache, family)
    session = Session.start(device, threads, cpu_time)

    from .bench import Bench  # imports ComfyUI's modules

    work = Bench(files, family, size, steps, repeats, cpu_time)
    figures: list[Figure] = []
    with torch.inference_mode():
        for found in _sections(work, session, wanted, profile):
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


def _sections(work: Bench, session: Session, wanted: Sequence[str], profile: Path | None) -> Iterator[list[Figure]]:
    for name in (name for name in SECTIONS if name in wanted):
        section = importlib.import_module(f".{name}", __package__)  # imports ComfyUI's modules
        yield section.figures(session.tree, session.cpu, work.repeats) if name == "imports" else section.figures(work)
    if profile is not None:
        from . import profiling

        yield profiling.figures(work, profile)


app.command("matrix")(matrix)
app.command("reuse")(reuse)
app.command("training")(training)
