"""`python -m comfyui_gcfg.benchmarks training`: the trainer against the step of diffusers' train_text_to_image.py."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..testkit.comfyui import uses_cpu
from ..testkit.errors import CommandError
from .figures import Figure, table, write_json
from .timing import Spread, ratio

if TYPE_CHECKING:  # seconds: not before --help is answered
    from .training_loops import Job, Name, Report

RESUMED = 10_000  # images of the cache that is half done


@dataclass(frozen=True)
class Rounds:
    """The reports of each loop, round by round."""

    ours: list[Report]
    theirs: list[Report]
    theirs_fused: list[Report]

    def seconds(self, loop: Name) -> list[float]:
        """Return each round's time for one step, the median of its steps."""
        return [statistics.median(report.seconds) for report in getattr(self, loop)]

    def peaks(self, loop: Name) -> list[float]:
        """Return each round's peak memory in bytes."""
        return [float(report.peak_bytes) for report in getattr(self, loop)]


def training(
    small: Annotated[bool, typer.Option("--small", help="A UNet of 25.8 M parameters, not all of SD1.5.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each starts every loop in a process of its own.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a loop in a round, after one that warms up.")] = 3,
    size: Annotated[
        int | None, typer.Option(help="Width and height in pixels; 256, or 64 for the small UNet; 512 on a GPU.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images of a step; 2, or 8 on a GPU.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Both keep an average of the weights (3.4 GB in fp32).")] = False,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images that are encoded for the cache; 3, or 64 on a GPU.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    peak: Annotated[
        float | None, typer.Option(help="The GPU's dense bf16 TFLOP/s, for its utilisation, if it is not known here.")
    ] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count the processes' CPU seconds: steadier on a busy machine.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for training-benchmarks.json.")] = Path("output"),
    cache: Annotated[Path, typer.Option(help="Folder for the checkpoint (2.1 GB, made once) and its cache.")] = Path(
        ".cache/benchmarks"
    ),
) -> None:
    """Measure the trainer: speed and memory beside diffusers' example, caching, data loading."""
    started = time.monotonic()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # of other programs
    cpu = uses_cpu(device)
    size = size or (64 if small else 256 if cpu else 512)
    if size < 64 or size % 64:
        raise CommandError(f"--size {size}: expected a positive multiple of 64, as SD1.5's latents need; round it.")
    if cpu_time and not cpu:
        raise CommandError("--cpu-time: the models run on a GPU, whose time it would not count; leave it out.")
    job = _job(small, size, batch or (2 if cpu else 8), steps, ema, threads, cpu, cpu_time, cache)
    environment = _environment(cpu, threads)
    rounds = _rounds(job, repeats, environment)
    figures = [
        *_against_peer(rounds, job),
        *_beside_the_step(rounds),
        *_utilisation(rounds, job, cpu, peak),
        *_caching(job, images or (3 if cpu else 64), environment),
        _resuming(repeats),
    ]
    setting = _setting(job, cpu) | {"load": load, "repeats": repeats, "seconds": round(time.monotonic() - started)}
    write_json(output / "training-benchmarks.json", setting, figures)
    print("\n" + ", ".join(f"{key} {value}" for key, value in setting.items()) + "\n")
    print(table(figures))
    print(f"\nJSON: {output / 'training-benchmarks.json'}")


def _job(
    small: bool, size: int, batch: int, steps: int, ema: bool, threads: int, cpu: bool, cpu_time: bool, cache: Path
) -> Job:
    """Make the files, and return the job of our loop."""
    from ..training.prior.model import open_prior
    from .training_files import FULL, SMALL, make_checkpoint, make_latents
    from .training_loops import Job

    print(f"Model files in {cache} ...", flush=True)
    checkpoint = make_checkpoint(cache.resolve(), SMALL if small else FULL)
    latents = make_latents(cache.resolve(), open_prior(checkpoint).load_vae(), size)
    precision = "fp32" if cpu else "bf16"
    return Job("ours", small, str(checkpoint), str(latents), size, batch, steps, precision, ema, threads, cpu_time)


def _rounds(job: Job, repeats: int, environment: dict[str, str]) -> Rounds:
    """Run every loop once per round, every second round backwards."""
    from .training_loops import run

    found = Rounds([], [], [])
    names: list[Name] = ["ours", "theirs", "theirs_fused"]
    for number in range(repeats):
        for name in names if number % 2 == 0 else reversed(names):
            report = run(replace(job, loop=name), environment)
            getattr(found, name).append(report)
            seconds = statistics.median(report.seconds)
            print(f"round {number + 1} of {repeats}, {name}: {seconds:.2f} s per step", file=sys.stderr, flush=True)
    return found


def _against_peer(rounds: Rounds, job: Job) -> Iterator[Figure]:
    """Speed and memory; a ratio is taken within each round."""
    peer = "train_text_to_image"
    loops: dict[Name, str] = {"ours": "gcfg train", "theirs": peer, "theirs_fused": f"{peer}, AdamW fused"}
    for loop, text in loops.items():
        speeds = Spread.of([job.batch / seconds for seconds in rounds.seconds(loop)])
        yield Figure.spread(f"speed_{loop}", text, speeds, "images/s")
    faster = "gcfg train / train_text_to_image, images per second"
    yield Figure.spread(
        "speedup", faster, ratio(rounds.seconds("theirs"), rounds.seconds("ours")), "x", 1.4, at_least=True
    )
    fused = ratio(rounds.seconds("theirs_fused"), rounds.seconds("ours"))
    yield Figure.spread("speedup_fused", f"the same, {peer} with fused AdamW", fused, "x")
    for loop, text in loops.items():
        peaks = Spread.of([peak / 1e6 for peak in rounds.peaks(loop)])
        yield Figure.spread(f"memory_{loop}", f"peak memory, {text}", peaks, "MB")
    memory = ratio(rounds.peaks("ours"), rounds.peaks("theirs"))
    yield Figure.spread("memory", "peak memory, gcfg train / train_text_to_image", memory, "x", 0.9)


def _beside_the_step(rounds: Rounds) -> Iterator[Figure]:
    shares = [100 * statistics.median(report.beside) for report in rounds.ours]
    yield Figure.spread("beside", "data loading and logging, of a step", Spread.of(shares), "%", 2.0)


def _utilisation(rounds: Rounds, job: Job, cpu: bool, peak: float | None) -> Iterator[Figure]:
    """What of the device's arithmetic the step uses: the model's FLOPs only, none for recomputing."""
    from .flops import peak_tflops, step_flops

    flops = step_flops(Path(job.checkpoint), job.size)
    rates = [job.batch * flops / seconds for seconds in rounds.seconds("ours")]
    note = f"{flops / 1e9:,.0f} GFLOP for an image's forward and backward pass"
    yield Figure.spread("rate", "gcfg train, model FLOPs", Spread.of([r / 1e9 for r in rates]), "GFLOP/s", note=note)
    peak = peak or (None if cpu else peak_tflops(_device(cpu)))
    if peak:
        used = Spread.of([100 * r / (1e12 * peak) for r in rates])
        yield Figure.spread("utilisation", f"the same of {peak:g} TFLOP/s", used, "%")


def _caching(job: Job, images: int, environment: dict[str, str]) -> Iterator[Figure]:
    from .training_loops import caching_job, run

    caching = caching_job(job, images)
    report = run(caching, environment)
    text = f"gcfg cache, {caching.size} x {caching.size}, without flips"
    yield Figure(
        "caching", text, 1 / report.seconds[0], "images/s", note=f"{images} images, fp32, {caching.batch} at a time"
    )
    yield Figure("caching_memory", "its peak memory", report.peak_bytes / 1e6, "MB")


def _resuming(repeats: int) -> Figure:
    """How long `gcfg cache` looks before it goes on with a half-done cache."""
    from .training_files import half_done_cache, plan_resumed

    with tempfile.TemporaryDirectory() as folder:
        images, cache, recipe = half_done_cache(Path(folder), RESUMED)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            plan = plan_resumed(images, cache, recipe)
            seconds.append(time.perf_counter() - start)
    left = sum(len(job.todo) for job in plan.jobs)
    if plan.reused + left != RESUMED:
        raise RuntimeError(f"the plan keeps {plan.reused} images and encodes {left}, expected {RESUMED} in all")
    note = f"{plan.reused:,} images kept, {left:,} left; Python's start and reading the VAE come on top"
    return Figure.spread("resuming", "looking through a half-done cache of 10,000", Spread.of(seconds), "s", note=note)


def _environment(cpu: bool, threads: int) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **own, **({"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if cpu else {})}


def _device(cpu: bool) -> str:
    import torch

    from .session import device_name

    return device_name(torch.device("cpu" if cpu else "cuda"))


def _setting(job: Job, cpu: bool) -> dict[str, Any]:
    """Return what the figures were measured on."""
    import diffusers
    import torch

    shown: Sequence[str] = ("size", "batch", "steps", "precision", "ema", "threads")
    values = asdict(job)
    return {
        "layout": job.layout.unet,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": _device(cpu),
        "cores": os.cpu_count(),
        **{key: values[key] for key in shown},
        "clock": "cpu" if job.cpu_time else "wall",
    }
