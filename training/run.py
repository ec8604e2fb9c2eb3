"""`gcfg train`: from a config to a trained model, or on from where it stopped."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ..gcfg.errors import GuidanceError
from . import checkpoints
from .checkpoints import Checkpoint
from .concept import drift, drift_table, null_text_features, predict, to_null_text
from .config import Config, changed_on_resume
from .learner import Learner, StepResult
from .material import Material, probes, read_material
from .methods.network import prompted
from .monitor import Monitor, Timing
from .processes import alone_in, join_processes, noted_signals, only_cpu
from .stream import shares
from .trained import export_run, manifest

DRIFT_SAMPLES = 40


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside the weights.

    Attributes:
        step: optimizer steps done, skipped ones included.
        skipped: how many of them were skipped.
        skipped_in_a_row: how many of the last ones.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def after(self, result: StepResult) -> Progress:
        """Return the progress one step later."""
        in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        return Progress(self.step + 1, self.skipped + result.skipped, in_a_row)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: by the signal that stopped it, or with an exported file (which the main process names)."""

    step: int
    signal: int = 0
    exported: Path | None = None


def train(config: Config) -> Outcome:
    """Train to `train.steps`, from the start or from the newest checkpoint, and export the result.

    Raises: GuidanceError: one sentence; what was saved before stays.
    """
    accelerator = new_accelerator(config)
    material = read_material(config)
    folder = Path(config.output.folder)
    with alone_in(folder, "output.folder"):
        found = checkpoints.newest(folder)
        _check_same_run(found, material, accelerator)
        learner = new_learner(material, accelerator, fresh=found is None)
        start = _take_up(found, learner) if found else Progress()
        accelerator.wait_for_everyone()  # before the main process tidies up what the others have just read
        if accelerator.is_main_process:
            checkpoints.prune(folder, config.output.keep_last)
            if found:
                print(f"Going on after step {start.step} of {config.train.steps}.", flush=True)
        step, signal = _loop(material, learner, start)
        if step < config.train.steps:
            return Outcome(step, signal)
        return Outcome(step, exported=export_run(folder) if accelerator.is_main_process else None)


def _loop(material: Material, learner: Learner, progress: Progress) -> tuple[int, int]:
    """Take the steps that are left; return the last one, and the signal that stopped the loop, or 0."""
    config, accelerator = material.config, learner.accelerator
    monitor = Monitor(config, progress.step) if accelerator.is_main_process else None
    signal = 0
    try:
        with noted_signals() as noted:
            while progress.step < config.train.steps and not signal:
                result, timing = take_step(material, learner, progress.step)
                progress = progress.after(result)
                if monitor:
                    monitor.step(progress.step, result, progress.skipped, timing)
                _check_sound(progress, result, config)
                signal = _agreed(noted, accelerator)
                last = signal or progress.step == config.train.steps
                if last or _due(progress.step, config.output.checkpoint_every):
                    _save(material, learner, progress)
                if monitor and _due(progress.step, config.sample.every):
                    monitor.samples(progress.step, material, learner)
    finally:
        if monitor:
            monitor.close()
    return progress.step, signal


def new_accelerator(config: Config) -> Accelerator:
    """Join the processes of the run; one alone is a run of one.

    Raises: GuidanceError: if the batch cannot be shared among them.
    """
    join_processes()
    accelerator = Accelerator(
        cpu=only_cpu(),
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if config.train.batch_size % accelerator.num_processes:
        raise GuidanceError(
            f"train.batch_size is {config.train.batch_size}, expected a multiple of the {accelerator.num_processes} "
            "processes that share it; change either."
        )
    return accelerator


def new_learner(material: Material, accelerator: Accelerator, fresh: bool) -> Learner:
    """Make the network of the prior, and the learner around it.

    Where it is fresh, its constants are found and measured; a checkpoint brings its own.
    """
    config = material.config
    if config.model.mode == "prompt":
        unet = prompted(material.prior, config.model, config.train.seed)
    else:
        unet = material.prior.load_unet().to(accelerator.device)
        constants = null_text_features(unet, "zero")
        if fresh:
            noised = probes(material, config.model.attention_mean_samples, accelerator.device)
            constants = null_text_features(unet, config.model.null_text, material.empty, noised)
        if fresh and accelerator.is_main_process:
            noised = probes(material, DRIFT_SAMPLES, accelerator.device)
            print(drift_table(drift(unet, constants, material.empty, noised)))
        to_null_text(unet, constants, config.model.train_null_text)
    conditions = material.conditions.to(accelerator.device)

    def bound(model: nn.Module, x: Tensor, t: Tensor, geometry: Tensor) -> Tensor:
        return predict(model, x, t, conditions, geometry)

    return Learner(unet, material.objective, bound, config.train, accelerator)


def take_step(material: Material, learner: Learner, step: int) -> tuple[StepResult, Timing]:
    """Take one step on this process's share of the batch, and time it."""
    train, accelerator = material.config.train, learner.accelerator
    rank, processes = accelerator.process_index, accelerator.num_processes
    now, following = (
        shares(each, train.batch_size, train.micro_batch_size, rank, processes) for each in (step, step + 1)
    )
    began = time.perf_counter()
    batches = material.stream.batches(now, following)
    data_seconds = time.perf_counter() - began
    result = learner.step(step, batches)  # it waits for its loss, so the clock tells the truth on a GPU too
    return result, Timing(time.perf_counter() - began, data_seconds)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _agreed(noted: list[int], accelerator: Accelerator) -> int:
    """Return the signal that any process got, or 0: all stop after the same step."""
    got: Tensor = accelerator.gather(torch.tensor(noted[:1] or [0], device=accelerator.device))
    return int(got.max())


def _check_sound(progress: Progress, result: StepResult, config: Config) -> None:
    if progress.skipped_in_a_row >= config.train.max_skipped_steps:
        raise GuidanceError(
            f"Loss or gradient was NaN or infinite in {progress.skipped_in_a_row} steps in a row (the last: loss "
            f"{result.loss}, gradient {result.grad_norm}), expected fewer than train.max_skipped_steps; lower "
            "train.learning_rate in a new output.folder, or set train.precision to fp32."
        )


def _save(material: Material, learner: Learner, progress: Progress) -> None:
    output = material.config.output
    if learner.accelerator.is_main_process:
        folder = Path(output.folder)
        tensors, scalars = learner.state()
        about = {
            **asdict(progress),
            **manifest(material),
            "trained_parameters": learner.trained_parameters,
            "scalars": scalars,
        }
        checkpoints.save(folder, about, tensors)
        checkpoints.prune(folder, output.keep_last)
    learner.accelerator.wait_for_everyone()


def _take_up(found: Checkpoint, learner: Learner) -> Progress:
    learner.load(found.tensors, found.manifest["scalars"])
    return Progress(*(found.manifest[name] for name in Progress.__dataclass_fields__))


def _check_same_run(found: Checkpoint | None, material: Material, accelerator: Accelerator) -> None:
    """Refuse to go on with another run than the one that was saved, or to start anew in one process and not in all."""
    config = material.config
    step = torch.tensor([found.step if found else 0], device=accelerator.device)
    steps: list[int] = accelerator.gather(step).tolist()
    if len(set(steps)) > 1:
        raise GuidanceError(
            f"The processes see different checkpoints in output.folder {config.output.folder!r}, of the steps {steps}; "
            "expected one folder that all machines share."
        )
    if not found:
        return
    other = f"{str(found.folder)!r} was made with other settings"
    fix = "change it back, or name another output.folder"
    if changes := changed_on_resume(found.manifest["config"], config):
        raise GuidanceError(f"{other}: {changes[0]}; {fix}.")
    now = manifest(material)
    for key, words in (("prior", "model.checkpoint holds another UNet"), ("data", "data.cache holds other images")):
        if found.manifest[key] != now[key]:
            raise GuidanceError(f"{other}: {words} than at the start of the run; {fix}.")
