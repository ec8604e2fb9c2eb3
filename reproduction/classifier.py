"""The network that reads digits and gives FID its features: trained on real scans in many colours and on the world.

It tells what a picture shows (which digit or shape), both colours, and whether it was written by hand, so that its
features, 64 numbers, see every way in which a generated picture may differ from a scan. Inception's features, made for
photographs, cannot be had here and would say little of digits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .scenes import COLOURS, DIGITS, SHAPES, Scene

FEATURES = 64
THINGS = (*DIGITS, *SHAPES)
_ANSWERS = {"thing": len(THINGS), "colour": len(COLOURS), "background": len(COLOURS), "handwritten": 2}


class Classifier(nn.Module):
    """uint8 pictures, (N, 3, 64, 64) -> features (N, 64); `answers` reads what the picture shows off them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Conv2d(width_in, width_out, 3, 2, 1), nn.BatchNorm2d(width_out), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, FEATURES))
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, count) for name, count in _ANSWERS.items()})

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.body(pictures.float() / 127.5 - 1)
        return features

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """Return the logits of each question."""
        return {name: head(functional.relu(features)) for name, head in self.heads.items()}


def features(weights: Path | None) -> Classifier:
    """Return the network as FID's extractor: `fid.extractor` names this function."""
    if weights is None:
        raise ValueError("the small world's extractor needs its weights")
    network = Classifier()
    network.load_state_dict(load_file(weights))
    return network.eval().requires_grad_(False)


def reads(weights: Path | None) -> Callable[[Tensor, str], Tensor]:
    """Return the test whether a picture shows a thing: `alignment.classifier` names this function."""
    network = features(weights)

    @torch.no_grad()
    def shows(pictures: Tensor, label: str) -> Tensor:
        answers = network.answers(network(pictures))
        if label in THINGS:
            return answers["thing"].argmax(1) == THINGS.index(label)
        return answers["colour"].argmax(1) == list(COLOURS).index(label)

    return shows


def train_classifier(
    scans: Tensor,
    digits: list[int],
    world: Tensor,
    scenes: list[Scene],
    steps: int,
    batch_size: int = 64,
    tick: Callable[[], object] = int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Train on scans in random colours and on drawn pictures, half of each batch from either.

    Args:
        scans: uint8, (N, 3, 64, 64), white on black.
        digits: what each one shows.
        world: uint8, (M, 3, 64, 64).
        scenes: what each one shows.
        steps: of AdamW, with one cycle of the learning rate.
        batch_size: pictures of one step.
        tick: called after each step.
        device: to train on.

    Returns: the weights.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = Classifier().to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    names = list(COLOURS)
    palette = torch.tensor(list(COLOURS.values())).float()
    drawn = torch.tensor([[THINGS.index(s.thing), names.index(s.colour), names.index(s.background), 0] for s in scenes])
    written = torch.tensor(digits)
    for _ in range(steps):
        i, j = (torch.from_numpy(rng.integers(0, n, batch_size // 2)) for n in (len(scans), len(world)))
        pairs = torch.from_numpy(np.stack([rng.permutation(len(names))[:2] for _ in i]))
        pictures = torch.cat((coloured(scans[i], palette[pairs[:, 0]], palette[pairs[:, 1]]), world[j]))
        truth = torch.cat((torch.cat((written[i, None], pairs, torch.ones(len(i), 1, dtype=torch.long)), 1), drawn[j]))
        found = network.answers(network(_moved(pictures, rng).to(device)))
        truth = truth.to(device)
        loss = torch.stack([functional.cross_entropy(found[q], truth[:, k]) for k, q in enumerate(_ANSWERS)]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        tick()
    return {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}


def coloured(scans: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Return white-on-black scans in other colours, uint8.

    Args:
        scans: uint8, (N, 3, H, W).
        colour: of the strokes, (N, 3), 0 .. 255.
        background: likewise.
    """
    ink = scans.float() / 255
    return (ink * colour[:, :, None, None] + (1 - ink) * background[:, :, None, None]).round().byte()


def _moved(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Return the pictures turned, scaled and shifted a little, each in its own way."""
    n = len(pictures)
    angle, scale = torch.from_numpy(rng.normal(0, 0.12, n)), torch.from_numpy(rng.uniform(0.85, 1.2, n))
    shift = torch.from_numpy(rng.normal(0, 0.06, (n, 2)))
    rows = torch.stack(
        (
            torch.stack((scale * angle.cos(), -scale * angle.sin(), shift[:, 0]), 1),
            torch.stack((scale * angle.sin(), scale * angle.cos(), shift[:, 1]), 1),
        ),
        1,
    )
    place = functional.affine_grid(rows.float(), list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures.float(), place, padding_mode="border", align_corners=False)
