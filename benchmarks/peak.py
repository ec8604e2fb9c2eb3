"""The most memory that a run of prior and concept UNet needs, from files on disk, beside the least it could need.

    ratio = peak of (load the prior, load the concept UNet, sample) / (used weights + one activation set)

It is measured in a process of its own, whose memory after importing ComfyUI is not counted.

- *Used weights* are the parameters of both UNets as they are kept (fp16 files become fp32 on the CPU), each storage
  once. A concept UNet has no weights of cross-attention, so memory they take while loading counts against us.
- *One activation set* is what a stock step of the prior with the run's batch of two (text and unconditional) needs
  beyond the loaded weights, in the same process, after the run.

The first run of a process also makes some megabytes that stay (caches of Python and torch): a few per cent of the small
layout, nothing of the whole one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .bench import Bench
from .figures import Figure
from .memory import Memory
from .process import in_new_process

STEPS = 2


def figures(bench: Bench) -> Iterator[Figure]:
    """Measure in a process of its own; to be called before this one holds models."""
    _ = bench.models  # their files are written here, not where memory is measured
    found = in_new_process(measure, **bench.values)
    figure = partial(Figure.of, "prior and concept UNet, from files")
    least = found["weights"] + found["activations"]
    yield figure("peak / (weights + activations)", [found["peak"] / least], "x", goal=1.05)
    for column in ("peak", "weights", "activations"):
        yield figure(column, [found[column] / 1e6], "MB")


def measure(**values: Any) -> dict[str, float]:
    """Start ComfyUI, load both models and sample; return bytes by the columns' names."""
    bench = Bench(**values)
    bench.start()
    from .cases import CONCEPT, STOCK, Sampling

    memory = Memory(bench.clock.device)
    torch.nn.Conv2d(4, 4, 3)(torch.zeros(1, 4, 8, 8, device="cpu"))  # what torch makes once and keeps
    with torch.inference_mode():
        start = memory.now()
        with memory.peak() as whole:
            models = [bench.models.prior, bench.models.concept]
            CONCEPT.run(bench.models, bench.latent, Sampling(STEPS))
        activations = []
        for _ in range(3):
            with memory.peak() as step:
                STOCK.run(bench.models, bench.latent, Sampling(1))
            activations.append(step.grown)
    weights = {p.data_ptr(): p.nbytes for each in models for p in each.model.diffusion_model.parameters()}
    return {
        "peak": whole.highest - start,
        "weights": sum(weights.values()),
        "activations": statistics.median(activations),
    }
