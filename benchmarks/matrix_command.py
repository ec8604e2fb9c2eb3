"""`python -m comfyui_gcfg.benchmarks matrix`: every way to make a guided step against stock guidance, by setting."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from ..testkit.errors import CommandError
from ..testkit.layouts import FAMILIES
from .figures import Figure, table
from .files import make_files
from .options import CpuTime, Device, Profile, Repeats, Threads
from .session import Session, check_size

if TYPE_CHECKING:  # importing them takes a running ComfyUI
    from .bench import Bench
    from .cases import Case

WEIGHTS = ("auto", "bf16", "fp16")


def matrix(
    family: Annotated[
        list[str],
        typer.Option(help="sd15 and sdxl are small layouts, sd15-full and sdxl-full the real ones; repeatable."),
    ] = ["sd15-full"],  # noqa: B006
    size: Annotated[list[int], typer.Option(help="Width and height in pixels; repeatable.")] = [256],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Images in a latent batch; repeatable.")] = [1],  # noqa: B006
    case: Annotated[
        list[str] | None, typer.Option(help="Only this row, by its name in the JSON, and stock; repeatable.")
    ] = None,
    repeats: Repeats = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a cold and of a warm run.")] = 1,
    threads: Threads = 1,
    device: Device = "auto",
    weights: Annotated[str, typer.Option(help="auto, bf16 or fp16: how ComfyUI stores UNet weights.")] = "auto",
    cpu_time: CpuTime = False,
    rival: Annotated[
        Path | None, typer.Option(help="Folder of another ComfyUI node pack, whose guider is timed on the same step.")
    ] = None,
    rival_node: Annotated[
        str | None, typer.Option(help="Id of its node; not needed where only one gives a GUIDER.")
    ] = None,
    rival_set: Annotated[list[str] | None, typer.Option(help="A widget of it, as NAME=VALUE; repeatable.")] = None,
    profile: Profile = None,
    output: Annotated[Path, typer.Option(help="Folder for matrix.json.")] = Path("output"),
    cache: Annotated[
        Path, typer.Option(help="Folder for the model files, made once (SD1.5 3.4 GB, SDXL 9.2 GB).")
    ] = Path(".cache/benchmarks"),
) -> None:
    """Compare guided steps with stock guidance, with their own model calls, and with separate calls, by setting."""
    for wanted in family:
        if wanted not in FAMILIES:
            raise CommandError(f"--family {wanted}: expected one of {', '.join(FAMILIES)}.")
    for pixels in size:
        check_size(pixels)
    if weights not in WEIGHTS:
        raise CommandError(f"--weights {weights}: expected one of {', '.join(WEIGHTS)}.")
    print(f"Model files in {cache} ...", flush=True)
    files = {name: make_files(cache, name) for name in dict.fromkeys(family)}
    session = Session.start(device, threads, cpu_time, [] if weights == "auto" else [f"{weights}-unet"])
    from .bench import Bench, unload_all
    from .room import fitting

    cases = _cases(case, rival, rival_node, rival_set or [])
    figures: list[Figure] = []
    about: dict[str, Any] = {}
    skipped: list[str] = []
    with torch.inference_mode():
        for name, found in files.items():
            bench = Bench(found, name, size[0], steps, repeats, cpu_time)
            rows = fitting(bench, cases, skipped)
            for setting in _settings(bench, rows, itertools.product(size, batch), figures):
                print(f"\n{setting}", flush=True)
            if rows:
                about[name] = _about(bench)
            if profile is not None:
                figures += _profiled(
                    bench, rows, profile if len(files) == 1 else profile.with_stem(f"{profile.stem}-{name}")
                )
            del bench
            unload_all()
    session.store(
        output / "matrix.json", {"repeats": repeats, "steps": steps, "models": about, "skipped": skipped}, figures
    )
    print(table([figure for figure in figures if figure.goal is not None]))
    print("".join(f"\nNot measured: {sentence}" for sentence in skipped))
    print(f"\nJSON: {output / 'matrix.json'}")


def _cases(names: Sequence[str] | None, rival: Path | None, node: str | None, widgets: Sequence[str]) -> list[Case]:
    from . import rivals
    from .cases import CASES

    known = [case.name for case in CASES]
    for name in names or []:
        if name not in known:
            raise CommandError(f"--case {name}: expected one of {', '.join(known)}.")
    cases = [case for case in CASES if not names or case.name in ("stock", *names)]
    return [*cases, *(rivals.cases(rival, node, widgets) if rival else ())]


def _settings(
    bench: Bench, cases: Sequence[Case], settings: Iterator[tuple[int, int]], figures: list[Figure]
) -> Iterator[str]:
    """Measure every setting; yield its tables."""
    from . import matrix_report
    from .matrix import measure

    if not cases:
        return
    for bench.size, bench.batch in settings:
        name = f"{bench.family}, {bench.size} px, batch {bench.batch}"
        found = matrix_report.figures(name, measure(bench, cases))
        figures += found
        yield matrix_report.tables(name, cases, found)


def _profiled(bench: Bench, rows: Sequence[Case], trace: Path) -> Iterator[Figure]:
    """Profile prior and concept UNet, or what of ours is measured where they are not."""
    from . import profiling

    ours = sorted((case for case in rows if case.ours), key=lambda case: case.name == "k2_concept")
    for case in ours[-1:]:
        for figure in profiling.figures(bench, trace, case):
            yield replace(figure, name=f"{bench.family}: {figure.name}", text=f"{bench.family}: {figure.text}")


def _about(bench: Bench) -> dict[str, Any]:
    parameters = sum(p.numel() for p in bench.prior.model.diffusion_model.parameters())
    return {"parameters": parameters, "dtype": str(bench.prior.model_dtype())}
