"""Diversities that one can compute by hand."""

import math

import numpy as np
import pytest
import torch
from comfyui_gcfg.evaluation.metrics.features import diversity, vendi


def test_diversity_is_the_mean_distance_between_two():
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert diversity(corners) == pytest.approx((3 + 4 + 5) / 3)
    assert diversity(corners * 2) == pytest.approx(8)


def test_equal_images_have_no_diversity():
    assert diversity(torch.ones(5, 3)) == 0
    assert vendi(torch.ones(5, 3)) == pytest.approx(1)


@pytest.mark.parametrize("kinds", [1, 2, 7])
def test_vendi_counts_kinds_that_have_nothing_in_common(kinds):
    assert vendi(torch.eye(7)[:kinds].repeat(3, 1) * 5) == pytest.approx(kinds)


def test_vendi_of_uneven_kinds_is_the_exponential_of_their_entropy():
    features = torch.eye(2)[[0, 0, 0, 1]]
    assert vendi(features) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_vendi_is_its_definition_in_numpy():
    features = np.random.default_rng(0).normal(size=(9, 4))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    shares = np.linalg.eigvals(unit @ unit.T / 9).real
    shares = shares[shares > 1e-12]
    assert vendi(torch.from_numpy(features)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
