"""The trainer beside the step of diffusers' train_text_to_image.py."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..testkit.errors import CommandError
from .bench import Bench
from .figures import Figure
from .harness import Clock, interleaved, ratio
from .memory import Memory
from .process import in_new_process

STEPS = 3  # that are timed, after one that warms up
OURS = "gcfg train"
PEERS = {"train_text_to_image": False, "train_text_to_image, AdamW fused": True}  # whether AdamW is fused
LAYOUTS = ("sd15", "sd15-full")


def figures(bench: Bench) -> Iterator[Figure]:
    """Start every loop once per round, in a process of its own."""
    if bench.layout not in LAYOUTS:
        raise CommandError("training: it is measured on SD1.5 only; leave --family out.")
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(bench.threads)}
    if bench.cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    batch = bench.batch or 2
    values = bench.values | {"batch": batch}
    in_new_process(make_files, environment, **values)

    def run(fused: bool | None, _: int) -> dict[str, Any]:
        found: dict[str, Any] = in_new_process(measure, environment, fused=fused, **values)
        return found

    loops = {OURS: None, **PEERS}
    calls = {name: partial(run, fused) for name, fused in loops.items()}
    yield from rows(interleaved(calls, bench.repeats, "training", warm_up=False), batch)


def rows(found: dict[str, list[dict[str, Any]]], batch: int) -> Iterator[Figure]:
    """The figures of what each loop measured, by round."""
    seconds = {name: [statistics.median(run["seconds"]) for run in runs] for name, runs in found.items()}
    peaks = {name: [float(run["peak"]) for run in runs] for name, runs in found.items()}
    for name in found:
        figure = partial(Figure.of, name)
        yield figure("speed", [batch / each for each in seconds[name]], "images/s")
        if name in PEERS:
            goals = (None, None) if PEERS[name] else (1.4, 0.9)
            faster = ratio(seconds[name], seconds[OURS])
            yield figure(f"speed, {OURS} / it", faster, "x", goal=goals[0], at_least=True)
            yield figure(f"memory, {OURS} / it", ratio(peaks[OURS], peaks[name]), "x", goal=goals[1])
        else:
            shares = [100 * statistics.median(run["beside"]) for run in found[name]]
            yield figure("data and logging, of a step", shares, "%", goal=2.0)
        yield figure("peak memory", [peak / 1e6 for peak in peaks[name]], "MB")


def make_files(**values: Any) -> None:
    """Write the checkpoint and the latents of a benchmark of these values, unless they are there."""
    from .training_files import make_checkpoint, make_latents

    bench = Bench(**values)
    make_latents(bench, make_checkpoint(bench))


def measure(fused: bool | None, **values: Any) -> dict[str, Any]:
    """Train for some steps.

    Args:
        fused: whether the peer's AdamW is fused; None for our loop.
        values: of the benchmark.

    Returns: the seconds of each timed step, all that the loop does in it included; of ours, the share of each that
        reading samples and reporting took, by the wall clock; and the most memory in bytes.
    """
    from .training_loops import ours, theirs

    bench = Bench(**values)
    torch.set_num_threads(bench.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "fp32" if device.type == "cpu" else "bf16"
    clock, seconds, beside = Clock(device, bench.cpu_time), [], []
    with tempfile.TemporaryDirectory() as output, Memory(device).peak() as peak:
        loop = ours(bench, precision, Path(output), STEPS + 1) if fused is None else theirs(bench, precision, fused)
        with loop as step:
            for _ in range(STEPS + 1):
                start, wall = clock.now(), time.perf_counter()
                spent = step()
                seconds.append(clock.now() - start)
                beside.append(spent / (time.perf_counter() - wall))
    return {"seconds": seconds[1:], "beside": beside[1:], "peak": peak.highest}
