"""The most memory that a run of prior and concept model needs, from files on disk, beside the least it could need.

    ratio = peak of (load the prior, load the concept model, sample) / (used weights + one activation set)

It is measured in a process of its own, whose memory after importing ComfyUI is not counted.

- On the CPU memory is the anonymous resident memory, looked at every 2 ms: what the process made. Pages of the model
  files are mapped, and the operating system takes them back when it needs them, so they are not counted. On a GPU it is
  what torch allocated there.
- *Used weights* are the parameters of both UNets as they are kept (fp16 files become fp32 on the CPU), each storage
  once. A concept model has no weights of cross-attention, so memory they take while loading counts against us.
- *One activation set* is what a stock step of the prior with the run's batch of two (text and unconditional) needs
  beyond the loaded weights, in the same process, after the run.

The first run of a process also makes some megabytes that stay (caches of Python and torch): a few per cent of the small
layout, nothing of the whole one.

fp8 rows: the concept model kept in `fp8_e4m3fn`, where this ComfyUI offers it, in bytes and as the error of the run's
result, with the concept model alone in fp8 and with both.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gcfg.terms import GuidanceTerm
from ..testkit.comfyui import find_comfyui
from ..testkit.inprocess import import_comfyui
from .figures import Figure
from .files import Files

if TYPE_CHECKING:  # importing it takes a running ComfyUI
    from .bench import Bench

GOAL = 1.05
FP8 = "fp8_e4m3fn"
_EVERY = 0.002  # seconds between two looks


@dataclass(frozen=True)
class Job:
    """What the process is told: files, sizes, and where to run."""

    prior: str
    concept: str
    family: str
    size: int
    steps: int
    threads: int
    cpu: bool


@dataclass(frozen=True)
class Report:
    """Bytes, and errors as relative L2 distances of a run's result to that without fp8; fp8's are None without it.

    Attributes:
        peak: of loading both models and sampling.
        peak_loading: of it, before sampling begins.
        weights: used by both models.
        activations: of one stock step.
        concept: of the concept model's weights.
        concept_fp8: of the same in fp8.
        error_concept_fp8: with the concept model in fp8.
        error_all_fp8: with both in fp8.
    """

    peak: int
    peak_loading: int
    weights: int
    activations: int
    concept: int
    concept_fp8: int | None = None
    error_concept_fp8: float | None = None
    error_all_fp8: float | None = None

    @property
    def ratio(self) -> float:
        """Peak over the least."""
        return self.peak / (self.weights + self.activations)


def figures(bench: Bench) -> list[Figure]:
    """Measure in a process of its own; to be called before this one holds models."""
    report = run(
        Job(
            str(bench.files.prior.resolve()),
            str(bench.files.concept.resolve()),
            bench.family,
            bench.size,
            bench.steps,
            torch.get_num_threads(),
            bench.clock.device.type != "cuda",
        )
    )
    rows = [
        Figure(
            "peak",
            "peak memory of prior + concept / used weights and one activation set",
            report.ratio,
            "x",
            goal=GOAL,
            note=f"{report.peak / 1e6:,.0f} MB ({report.peak_loading / 1e6:,.0f} MB while loading); weights "
            f"{report.weights / 1e6:,.0f} MB, activations {report.activations / 1e6:,.0f} MB",
        ),
    ]
    if report.concept_fp8 is None or report.error_concept_fp8 is None or report.error_all_fp8 is None:
        return rows
    return [
        *rows,
        Figure("concept_fp8", "concept UNet in fp8 / as the file's default", report.concept_fp8 / report.concept, "x"),
        Figure("error_concept_fp8", "error of a run with the concept UNet in fp8", report.error_concept_fp8, ""),
        Figure("error_all_fp8", "error of a run with both models in fp8", report.error_all_fp8, ""),
    ]


def run(job: Job) -> Report:
    """Do a job in a new process. Raises: RuntimeError: with the end of what it said, if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "report.json"
        command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(job)), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the peak's process failed ({done.returncode}):\n{done.stderr[-3000:]}")
        return Report(**json.loads(answer.read_text(encoding="utf-8")))


def measure(job: Job) -> Report:
    """Load, sample, and load again in fp8, in this process."""
    from .bench import Bench

    bench = Bench(Files(Path(job.prior), Path(job.concept)), job.family, job.size, job.steps, 1)
    memory = Memory(bench.clock.device)
    torch.nn.Conv2d(4, 4, 3)(torch.zeros(1, 4, 8, 8, device="cpu"))  # what torch makes once and keeps
    start = memory.now()
    with memory.peak() as whole:
        with memory.peak() as loading:
            models = [bench.prior, bench.concept]
        plain = _sample(bench, *models)
    weights = sum(_weights(*models).values())
    activations = round(statistics.median(_activations(bench, memory) for _ in range(3)))
    return Report(whole[0] - start, loading[0] - start, weights, activations, _size(models[1]), **_fp8(bench, plain))


class Memory:
    """Bytes that this process holds of its own making, on the device that models run on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """Bytes held, once nobody holds what is not needed."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif sys.platform == "linux":  # glibc keeps freed blocks for later
            ctypes.CDLL(None).malloc_trim(0)
        return self._read()

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """The most within the block, and what there was before it, filled in when the block ends."""
        found: list[int] = []
        before = self.now()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield found
            found += [torch.cuda.max_memory_allocated(self.device), before]
            return
        highest, done = before, threading.Event()

        def look() -> None:
            nonlocal highest
            while not done.wait(_EVERY):
                highest = max(highest, self._read())

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield found
        finally:
            done.set()
            looking.join()
            found += [max(highest, self._read()), before]

    def _read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if sys.platform == "linux":
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        import psutil

        return int(psutil.Process().memory_full_info().uss)


def _terms(bench: Bench, concept: Any) -> list[GuidanceTerm]:
    return [
        GuidanceTerm(7.5, conditioning=bench.prompt(1)),
        GuidanceTerm(1.5, model=concept, conditioning=bench.prompt(2)),
    ]


def _sample(bench: Bench, prior: Any, concept: Any) -> Tensor:
    return bench.gcfg(prior, bench.prompt(0), _terms(bench, concept), bench.steps)


def _activations(bench: Bench, memory: Memory) -> int:
    node = sys.modules["nodes"].KSampler()
    with memory.peak() as found:
        node.sample(bench.prior, 1, 1, 7.5, "euler", "normal", bench.prompt(1), bench.prompt(0), bench.latent, 1.0)
    return found[0] - found[1]


def _weights(*models: Any) -> dict[int, int]:
    return {p.data_ptr(): p.nbytes for model in models for p in model.model.diffusion_model.parameters()}


def _size(model: Any) -> int:
    return sum(_weights(model).values())


def _fp8(bench: Bench, plain: Tensor) -> dict[str, Any]:
    """Load the models again in fp8; an empty dict where this ComfyUI cannot."""
    from ..nodes.runtime.concept import WEIGHT_DTYPES, load_concept_unet
    from .ksampler import relative_error

    if FP8 not in WEIGHT_DTYPES:
        return {}
    concept = load_concept_unet(str(bench.files.concept), FP8)
    error = relative_error(_sample(bench, bench.prior, concept), plain)
    prior = load_concept_unet(str(bench.files.prior), FP8)
    return {
        "concept_fp8": _size(concept),
        "error_concept_fp8": error,
        "error_all_fp8": relative_error(_sample(bench, prior, concept), plain),
    }


def main() -> None:
    """Do the job named on the command line."""
    job, answer = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    comfy = import_comfyui(find_comfyui(), job.cpu)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    torch.set_num_threads(job.threads)
    with torch.inference_mode():
        report = measure(job)
    answer.write_text(json.dumps(asdict(report)), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # ComfyUI's threads need not be waited for


if __name__ == "__main__":
    main()
