"""The loops of the training benchmark. Each runs in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ..training.config import Config
from ..training.data.cache import build_cache
from ..training.data.shards import Recipe, vae_fingerprint
from ..training.dry_run import peak_memory
from ..training.material import read_material
from ..training.monitor import Monitor
from ..training.prior.model import open_prior
from ..training.run import new_accelerator, new_learner, take_step
from .timing import Clock
from .training_files import FULL, SMALL, Layout, make_images
from .training_peer import PeerSettings, make_peer

Name = Literal["ours", "theirs", "theirs_fused", "caching"]
CACHING_SIZE = 512  # pixels; the paper's


@dataclass(frozen=True)
class Job:
    """One process's work.

    Attributes:
        loop: which.
        small: the small layout.
        checkpoint: the prior's file.
        latents: folder of the cache to train on.
        size: side of the images, in pixels.
        batch: images of a step.
        steps: timed steps, or images to encode.
        precision: "fp32" or "bf16".
        ema: whether an average of the weights is kept.
        threads: of torch on the CPU.
        cpu_time: count computing seconds in place of the wall clock's.
    """

    loop: Name
    small: bool
    checkpoint: str
    latents: str
    size: int
    batch: int
    steps: int
    precision: str
    ema: bool
    threads: int
    cpu_time: bool

    @property
    def layout(self) -> Layout:
        """Sizes of the checkpoint."""
        return SMALL if self.small else FULL


@dataclass(frozen=True)
class Report:
    """What a process measured.

    Attributes:
        seconds: of each timed step, all that the loop does in it included.
        beside: share of each step that reading samples and reporting took, by the wall clock (ours only).
        peak_bytes: the most memory in use.
        losses: of each timed step.
    """

    seconds: list[float]
    peak_bytes: int
    beside: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def run(job: Job, environment: dict[str, str]) -> Report:
    """Do a job in a new process.

    Raises: RuntimeError: with the end of what the process said, if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "report.json"
        command = [sys.executable, "-m", __name__, json.dumps(asdict(job)), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"the {job.loop} loop failed ({done.returncode}):\n{done.stderr[-3000:]}")
        return Report(**json.loads(answer.read_text(encoding="utf-8")))


def ours(job: Job, folder: Path) -> Report:
    """The body of `gcfg train`: its own functions on a real cache, without samples and checkpoints."""
    config = Config.model_validate(
        {
            "model": {"checkpoint": job.checkpoint},
            "data": {"cache": job.latents, "resolution": job.size},
            "train": {
                "steps": job.steps + 1,
                "batch_size": job.batch,
                "precision": job.precision,
                "ema_decay": 0.9999 if job.ema else 0.0,
            },
            "output": {"folder": str(folder)},
        }
    )
    accelerator = new_accelerator(config)
    material = read_material(config)
    learner = new_learner(config, material, accelerator, fresh=False)
    monitor, clock = Monitor(config, 0), Clock(accelerator.device, job.cpu_time)
    seconds, beside, losses = [], [], []
    for step in range(job.steps + 1):
        start = clock.now()
        result, timing = take_step(config, material, learner, accelerator, step)
        reporting = time.perf_counter()
        monitor.step(step + 1, result, 0, timing)
        reported = time.perf_counter() - reporting
        end = clock.now()
        if step:  # the first one warms up
            seconds.append(end - start)
            beside.append((timing.data_seconds + reported) / (timing.seconds + reported))
            losses.append(result.loss)
    monitor.close()
    return Report(seconds, _peak_bytes(), beside, losses)


def theirs(job: Job, folder: Path) -> Report:
    """The peer's steps."""
    fused = job.loop == "theirs_fused"
    settings = PeerSettings(Path(job.checkpoint), job.layout, job.size, job.batch, job.precision, job.ema, fused)
    step = make_peer(settings)
    clock = Clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"), job.cpu_time)
    step()
    seconds, losses = [], []
    for _ in range(job.steps):
        seconds.append(clock.time(lambda: losses.append(step())))
    return Report(seconds, _peak_bytes(), losses=losses)


def caching(job: Job, folder: Path) -> Report:
    """`gcfg cache` on a few images, after one that warms up; `seconds` are those of one image."""
    vae = open_prior(Path(job.checkpoint)).load_vae()
    recipe = Recipe(vae_fingerprint(vae), job.size, "resize", False)
    if torch.cuda.is_available():
        vae = vae.to("cuda")
    rates = []
    for name, count in (("warm", 1), ("timed", job.steps)):
        images = make_images(folder / f"{name}-images", count, job.size)
        report = build_cache(images, folder / name, vae, recipe, batch_size=job.batch, workers=0, progress=False)
        rates.append(report.images_per_second)
    return Report([1 / rates[-1]], _peak_bytes())


LOOPS: dict[Name, Callable[[Job, Path], Report]] = {
    "ours": ours,
    "theirs": theirs,
    "theirs_fused": theirs,
    "caching": caching,
}


def main() -> None:
    """Do the job named on the command line."""
    job, answer = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        report = LOOPS[job.loop](job, Path(folder))
    answer.write_text(json.dumps(asdict(report)), encoding="utf-8")


def caching_job(job: Job, images: int) -> Job:
    """Return the caching beside a training job: one image at a time on the CPU, eight on a GPU, always in fp32."""
    size, batch = 64 if job.small else CACHING_SIZE, 1 if job.precision == "fp32" else 8
    return replace(job, loop="caching", size=size, batch=batch, steps=images)


def _peak_bytes() -> int:
    """Return the most memory ever in use: of the GPU if there is one, else of this process."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        # getrusage would count what the parent held when it started this process.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return peak_memory()


if __name__ == "__main__":
    main()
