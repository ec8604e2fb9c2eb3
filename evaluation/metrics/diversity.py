"""How much the images of one prompt differ from each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pdist


def diversity(features: Tensor) -> float:
    """Return the mean Euclidean distance between two of the features, (N, D) with N > 1."""
    if len(features) < 2:
        raise ValueError(f"diversity of {len(features)} image(s), expected at least two")
    return float(pdist(features.double()).mean())


def vendi(features: Tensor) -> float:
    """Return the effective number of different images among N, from 1 to N, of features (N, D).

    exp(-sum_k l_k log l_k),  l_k the eigenvalues of K / N,  K the features' cosine similarities
                                                                    # Friedman & Dieng 2023, Eq. 2
    """
    unit = normalize(features.double(), dim=1)
    shares = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())
