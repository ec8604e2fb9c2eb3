"""The networks that read pictures of the world: one also gives FID its features, the other one is its second opinion.

Both tell the thing, its group, the look, the background and the attributes. They share no layer, no picture and no
random number: the second is another architecture, saw other placements, and never saw the 3D picture of what is held
out, while the first did, or it could not tell how real a held-out thing in 3D is.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .captions import BACKGROUNDS, ground
from .pictures import Drawing, Drawings, compose, draw_placement
from .things import ATTRIBUTES, GROUPS, things
from .vendors import INK, LOOKS, THREE_D

FEATURES = 128
BATCH = 48
THINGS = tuple(thing.name for thing in things())
KINDS = (*LOOKS, INK, THREE_D)
_CHOICES = {"thing": THINGS, "group": tuple(GROUPS), "look": KINDS, "background": tuple(BACKGROUNDS)}
_SOLID_SHARE = 0.3


class Judge(nn.Module):
    """uint8 pictures, (N, 3, 96, 96) -> features (N, 128); `answers` reads what the picture shows off them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = self._body()
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in _CHOICES.items()})
        self.attributes = nn.Linear(FEATURES, len(ATTRIBUTES))

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features."""
        features: Tensor = self.body(pictures.float() / 127.5 - 1)
        return features

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """Return the logits of each question."""
        open_ = functional.relu(features)
        return {**{name: head(open_) for name, head in self.heads.items()}, "attributes": self.attributes(open_)}

    def _body(self) -> nn.Module:
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise((3, 32, 64, 96, 128, 128)):
            layers += [nn.Conv2d(width_in, width_out, 3, 2, 1), nn.BatchNorm2d(width_out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 9, FEATURES))


class SecondJudge(Judge):
    """The same questions put to patches of 8 x 8 pixels that attend to each other: no convolution over pixels."""

    def _body(self) -> nn.Module:
        width = 96
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, functional.gelu, batch_first=True, norm_first=True)
        patches = nn.Conv2d(3, width, 8, 8)
        return nn.Sequential(
            patches, nn.Flatten(2), _Places(width, 144), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            _Mean(), nn.LayerNorm(width), nn.Linear(width, FEATURES),
        )  # fmt: skip


class _Places(nn.Module):
    """(N, C, L) -> (N, L, C), each place with a vector of its own added."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) + self.vectors


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def judge_loss(
    drawings: Drawings, wanted: Callable[[Drawing], bool]
) -> Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]:
    """Return the loss of one step: cross-entropy of every question, on drawings that are `wanted`."""
    solid = drawings.choose(lambda row: row.look == THREE_D and wanted(row))
    others = drawings.choose(lambda row: row.look != THREE_D and wanted(row))

    def loss(network: nn.Module, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        judge = cast(Judge, network)
        kinds = [solid if rng.random() < _SOLID_SHARE else others for _ in range(BATCH)]
        rows = [kind[int(rng.integers(len(kind)))] for kind in kinds]
        places = [draw_placement(row, rng) for row in rows]
        pictures = roughened(compose(drawings, rows, places), noise).to(next(judge.parameters()).device)
        found = judge.answers(judge(pictures))
        truth = {
            "thing": [THINGS.index(row.thing.name) for row in rows],
            "group": [list(GROUPS).index(row.thing.group) for row in rows],
            "look": [KINDS.index(row.look) for row in rows],
            "background": [list(BACKGROUNDS).index(place.background) for place in places],
        }
        total = functional.binary_cross_entropy_with_logits(
            found["attributes"],
            torch.tensor([[float(name in row.thing.attributes) for name in ATTRIBUTES] for row in rows]).to(
                found["attributes"]
            ),
        )
        for name, numbers in truth.items():
            total = total + functional.cross_entropy(found[name], torch.tensor(numbers).to(pictures.device))
        return total

    return loss


def roughened(pictures: Tensor, noise: torch.Generator) -> Tensor:
    """Return pictures with noise of random strength: generated ones are not clean either."""
    strength = 12 * torch.rand(len(pictures), 1, 1, 1, generator=noise)
    return (pictures + strength * torch.randn(pictures.shape, generator=noise)).clamp(0, 255).round().byte()


def features(weights: Path | None) -> Judge:
    """Return the first judge as FID's extractor: `fid.extractor` names this function."""
    return _read(Judge(), weights)


def reads(weights: Path | None) -> Callable[[Tensor, str], Tensor]:
    """Return the first judge's test of a label: `alignment.classifier` names this function."""
    return _reader(_read(Judge(), weights))


def second_reads(weights: Path | None) -> Callable[[Tensor, str], Tensor]:
    """Return the second judge's test of a label."""
    return _reader(_read(SecondJudge(), weights))


def _read(judge: Judge, weights: Path | None) -> Judge:
    if weights is None:
        raise ValueError("a judge of the world of emoji needs its weights")
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return judge.eval().requires_grad_(False)


def _reader(judge: Judge) -> Callable[[Tensor, str], Tensor]:
    """Return the test whether a picture shows a thing, has an attribute, or is `on a blue background`."""
    grounds = [ground(name) for name in BACKGROUNDS]

    @torch.no_grad()
    def shows(pictures: Tensor, label: str) -> Tensor:
        answers = judge.answers(judge(pictures))
        if label in THINGS:
            return answers["thing"].argmax(1) == THINGS.index(label)
        if label in grounds:
            return answers["background"].argmax(1) == grounds.index(label)
        return answers["attributes"][:, list(ATTRIBUTES).index(label)] > 0

    return shows
