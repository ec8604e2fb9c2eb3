"""One optimizer step, and everything that it changes: weights, optimizer, average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..gcfg.concept_file import FEATURE
from ..gcfg.errors import GuidanceError
from .config import TrainConfig
from .objective import Objective
from .stream import Batch

# (unet, x, t, geometry) -> output; the conditions beside x and t are bound in it.
Predict = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss: mean over the whole batch, of all processes.
        grad_norm: before clipping.
        skipped: whether the weights were left alone because loss or gradient was NaN or infinite.
    """

    loss: float
    grad_norm: float
    skipped: bool


class Learner:
    """The UNet in training. All processes hold the same one, and change it alike; the main one keeps its average."""

    def __init__(
        self, unet: nn.Module, objective: Objective, predict: Predict, config: TrainConfig, accelerator: Accelerator
    ) -> None:
        self.unet = unet.to(accelerator.device).train()
        self._objective, self._predict = objective, predict
        self.accelerator = accelerator
        self._config = config
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()  # type: ignore[operator]
        self._names = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        # What is frozen is the prior's, and no checkpoint holds it; but for the constants of a null-text network.
        self._kept = [name for name in unet.state_dict() if name in self._names or name.endswith(FEATURE)]
        self._optimizer = _optimizer(self.parameters, config, accelerator.device)
        # The main process alone samples and saves. foreach would hold a second copy of all weights for a moment.
        averages = config.ema_decay > 0 and accelerator.is_main_process
        self._ema = EMAModel(self.parameters, config.ema_decay, foreach=False) if averages else None
        if config.compile:
            unet.compile()
        self._model = accelerator.prepare_model(unet)

    @property
    def trained_parameters(self) -> int:
        """Number of values that a step changes."""
        return sum(parameter.numel() for parameter in self.parameters)

    def step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Take one step on this process's share of the batch.

            loss = mean over the batch of weight(t) mean (UNet(x, t) - target)^2

        Raises: GuidanceError: if memory runs out.
        """
        try:
            loss = self._accumulate(micro_batches)
            limit = self._config.max_grad_norm or float("inf")
            grad_norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
            skipped = not math.isfinite(loss) or not math.isfinite(grad_norm)
            if not skipped:
                self._update(step)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise GuidanceError(
                f"Out of memory with {len(micro_batches[0].u)} images at once on {self.accelerator.device}; set "
                "train.micro_batch_size to half of that, or train.gradient_checkpointing to true, and run the same "
                "command again."
            ) from error
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, skipped)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Hold the averaged weights in the UNet, in evaluation mode, within the `with` block."""
        self.unet.eval()
        if self._ema:
            self._ema.store(self.parameters)
            self._ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self._ema:
                self._ema.restore(self.parameters)
            self.unet.train()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return tensors by file name, and the numbers beside them, of everything that the prior does not tell."""
        weights = self.unet.state_dict()
        tensors: dict[str, dict[str, Tensor]] = {"unet": {name: weights[name] for name in self._kept}, "optimizer": {}}
        scalars: dict[str, Any] = {"optimizer": {}}
        for index, entries in self._optimizer.state_dict()["state"].items():
            for key, value in entries.items():
                where = tensors if isinstance(value, Tensor) else scalars
                where["optimizer"][f"{self._names[index]}|{key}"] = value
        if self._ema:
            tensors["ema"] = dict(zip(self._names, self._ema.shadow_params, strict=True))
            scalars["ema_steps"] = self._ema.optimization_step
        return tensors, scalars

    def load(self, read: Callable[[str], dict[str, Tensor]], scalars: dict[str, Any]) -> None:
        """Take up a saved state; `read` gives the tensors of a file name."""
        weights, saved = self.unet.state_dict(), read("unet")
        for name in self._kept:
            weights[name].copy_(saved[name])
        index = {name: i for i, name in enumerate(self._names)}
        state: dict[int, dict[str, Any]] = {}
        for name, value in [*read("optimizer").items(), *scalars["optimizer"].items()]:
            parameter, _, key = name.rpartition("|")
            state.setdefault(index[parameter], {})[key] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self._ema:
            averages = read("ema")
            for shadow, name in zip(self._ema.shadow_params, self._names, strict=True):
                shadow.copy_(averages[name])
            self._ema.optimization_step = scalars["ema_steps"]

    def _update(self, step: int) -> None:
        rate = self._config.learning_rate * min(1.0, (step + 1) / max(1, self._config.warmup_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        if self._ema:
            self._ema.step(self.parameters)

    def _accumulate(self, micro_batches: Sequence[Batch]) -> float:
        """Add up the gradients of the whole batch, and return its loss."""
        processes = self.accelerator.num_processes
        images = processes * sum(len(batch.u) for batch in micro_batches)
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            # Gradients travel between processes once per step, with the last micro batch.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._model):
                loss = self._summed_loss(batch.to(self.accelerator.device)) / images
                self.accelerator.backward(loss * processes)  # DDP takes the mean over processes
            total += loss.detach()
        return float(self.accelerator.reduce(total, "sum"))

    def _summed_loss(self, batch: Batch) -> Tensor:
        t = self._objective.timesteps(batch.u)
        x = self._objective.noised(batch.x0, batch.noise, t)
        output = self._predict(self._model, x, t, batch.geometry)
        error = output.float() - self._objective.target(batch.x0, batch.noise, t)
        return (error.square().mean(dim=(1, 2, 3)) * self._objective.loss_weights(t, self._config.min_snr_gamma)).sum()


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            config.learning_rate,
            betas,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
    if device.type != "cuda":
        raise GuidanceError(f"train.optimizer 'adamw_8bit' needs a CUDA device, got {device}; use 'adamw'.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise GuidanceError(
            "train.optimizer 'adamw_8bit' needs bitsandbytes, which was not found; install it: pip install bitsandbytes"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters, config.learning_rate, betas, weight_decay=config.weight_decay
    )
    return optimizer
