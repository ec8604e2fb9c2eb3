"""What a person sees of a run: progress bar, log.jsonl, TensorBoard and sample grids. Only the main process writes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .concept import predict
from .config import Config
from .files import whole_file
from .learner import Learner, StepResult
from .material import Material, read_vae
from .picture_grid import labelled_grid
from .prior.text_encoder import Conditions
from .sampling import Denoise, decode, guided, sample, starting_noise

LOG = "log.jsonl"


@dataclass(frozen=True)
class Timing:
    """Seconds that a step took, and how many of them went by until it had its samples."""

    seconds: float
    data_seconds: float


class Monitor:
    """Reports the steps of a run, from the one it starts with."""

    def __init__(self, config: Config, start: int) -> None:
        self._folder = folder = Path(config.output.folder)
        folder.mkdir(parents=True, exist_ok=True)
        keep_lines(folder / LOG, start)
        self._every = config.output.log_every
        self._batch_size = config.train.batch_size
        self._file = (folder / LOG).open("a", encoding="utf-8")
        self._board = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=start) if config.output.tensorboard else None
        )
        self._bar = tqdm(total=config.train.steps, initial=start, unit="step", dynamic_ncols=True)
        self._seconds, self._last = 0.0, start

    def step(self, step: int, result: StepResult, skipped: int, timing: Timing) -> None:
        """Report that `step` steps are done, `skipped` of them skipped; `result` and `timing` are the last one's.

        The speed leaves out checkpoints and sample grids.
        """
        self._bar.update(1)
        self._seconds += timing.seconds
        if step % self._every and step != self._bar.total:
            return
        rate = (step - self._last) * self._batch_size / self._seconds
        self._seconds, self._last = 0.0, step
        line: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "skipped": skipped,
            "images": step * self._batch_size,
            "images_per_second": round(rate, 3),
            "data_seconds": round(timing.data_seconds, 6),
            "seconds": round(timing.seconds, 6),
            "time": round(time.time(), 3),
        }
        if torch.cuda.is_available():
            line["peak_memory"] = torch.cuda.max_memory_allocated()
        # JSON has no NaN; a skipped step's loss is null there.
        line = {key: value if np.isfinite(value) else None for key, value in line.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._bar.set_postfix({"loss": f"{result.loss:.4f}", "images/s": f"{rate:.2f}"})
        if self._board:
            for key in ("loss", "grad_norm", "images_per_second"):
                self._board.add_scalar(key, line[key] if line[key] is not None else float("nan"), step)

    def samples(self, step: int, material: Material, learner: Learner) -> None:
        """Draw the run's grid, samples/step-N.png in its folder."""
        grid = sample_grid(material, learner)
        with whole_file(self._folder / "samples" / f"step-{step:08d}.png") as beside:
            grid.save(beside, format="PNG")
        if self._board:
            self._board.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    def close(self) -> None:
        """Write everything out."""
        self._bar.close()
        self._file.close()
        if self._board:
            self._board.close()


def sample_grid(material: Material, learner: Learner) -> Image.Image:
    """Return GCFG of the concept around the frozen prior: one row for each weight, one column for each seed.

    The prior and the autoencoder are read anew and let go: between two grids they take no memory.
    """
    config, device = material.config, learner.accelerator.device
    vae, unet = read_vae(material.prior, config), material.prior.load_unet().to(device)
    prior = _denoiser(unet, material, material.empty.to(device))
    x = starting_noise(config.sample.seeds, material.latents.shape).to(device)
    with learner.averaged():
        concept = _denoiser(learner.unet, material, material.conditions.to(device))
        latents = [
            sample(guided(prior, concept, weight), x, material.objective, config.sample.steps)
            for weight in config.sample.weights
        ]
    vae.to(device)
    captions = [f"w = {weight:g}" for weight in config.sample.weights]
    return labelled_grid([(caption, decode(vae, each)) for caption, each in zip(captions, latents, strict=True)])


def _denoiser(unet: nn.Module, material: Material, conditions: Conditions) -> Denoise:
    def denoised(x: Tensor, t: Tensor) -> Tensor:
        return material.objective.denoised(x, predict(unet, x, t, conditions), t)

    return denoised


def keep_lines(path: Path, step: int) -> None:
    """Cut the log back to the first `step` steps: the run does the others again after its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):  # the line that a killed process was writing
            break
        kept.append(line + "\n")
    with whole_file(path) as beside:
        beside.write_text("".join(kept), encoding="utf-8")
