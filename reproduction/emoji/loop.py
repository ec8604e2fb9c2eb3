"""A training loop that may be killed at any time: what it does at a step depends on the seed and the step alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...training.files import whole_file

Loss = Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]


@dataclass(frozen=True)
class Plan:
    """How long and how fast a network learns.

    Attributes:
        steps: of AdamW.
        learning_rate: after the warm-up, until the cooldown.
        warm_up: steps over which it rises.
        cooldown: part of the steps, at the end, over which it falls to zero.
        decay: of the averaged weights, which are what comes out.
        seed: of everything random.
        bf16: whether the loss is computed in bfloat16 where PyTorch's autocast does so; weights stay in fp32.
    """

    steps: int
    learning_rate: float
    warm_up: int = 200
    cooldown: float = 0.3
    decay: float = 0.9995
    seed: int = 0
    bf16: bool = False

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        falling = (self.steps - step) / max(1, round(self.cooldown * self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up, falling)


@dataclass(frozen=True)
class Watch:
    """What is done beside the training now and then.

    Attributes:
        every: steps.
        look: called with the step's number, the averaged weights and the mean loss since the last time.
    """

    every: int
    look: Callable[[int, dict[str, Tensor], float], None]


def train(
    network: nn.Module,
    loss: Loss,
    plan: Plan,
    state: Path,
    watch: Watch | None = None,
    seconds: float = 180,
) -> None:
    """Train until the plan is through, and leave the averaged weights in the network.

    Args:
        network: as it is before the first step; a state takes its place.
        loss: of one step, from the network and that step's own two random generators.
        plan: how long.
        state: the file that holds everything between two steps; it is kept at the end.
        watch: what is done beside it.
        seconds: between two writes of the state.
    """
    parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, plan.learning_rate, betas=(0.9, 0.99), fused=True)
    average = [parameter.detach().clone() for parameter in parameters]
    first, losses = 0, 0.0
    if state.exists():
        kept = torch.load(state, map_location=parameters[0].device, weights_only=True)
        first, losses = kept["step"], kept["losses"]
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        torch._foreach_copy_(average, kept["average"])
    written = time.time()

    def write(step: int) -> None:
        with whole_file(state) as beside:
            torch.save(
                {
                    "step": step,
                    "losses": losses,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                },
                beside,
            )

    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        numbers = np.random.default_rng((plan.seed, step))
        noise = torch.Generator().manual_seed(int(numbers.integers(1 << 62)))
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=plan.bf16):
            value = loss(network, numbers, noise)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, parameters, 1 - min(plan.decay, (step + 1) / (step + 10)))
        losses += value.item()
        if watch and (step + 1) % watch.every == 0:
            watch.look(step + 1, _with(network, average), losses / watch.every)
            losses = 0.0
        if time.time() - written > seconds or step + 1 == plan.steps:
            write(step + 1)
            written = time.time()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def _with(network: nn.Module, average: list[Tensor]) -> dict[str, Tensor]:
    """Return the network's state with the averaged weights in place of the learning ones."""
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    return {**network.state_dict(), **dict(zip(names, average, strict=True))}
