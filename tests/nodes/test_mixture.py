"""Exact scores of a Gaussian mixture through ComfyUI's own sampler: GCFG samples the product that it promises.

Latent channels 0 and 2 carry one attribute, 1 and 3 another, independent of it. The prior is a mixture of -1 and +1 in
each; a conditional model knows its own attribute only (+1). Then p(x) p(c1|x) p(c2|x) (paper section 4.2) is +1 in
both, at every noise level, so sampling with weights 1 and 1 must give N(1, 0.3^2) in every channel.
"""

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm

SPREAD = 0.3
POINTS = 64 * 64  # per channel
# Standard error of a mean of POINTS draws is 0.3 / 64; the rest is 40 Euler steps from a finite sigma_max.
MEAN_TOLERANCE = 4 * SPREAD / 64 + 0.03
SPREAD_TOLERANCE = 0.03


def mixture(x, sigma):
    """E[x0 | x] of an even mixture of N(-1, s^2) and N(1, s^2)."""
    variance = SPREAD**2 + sigma**2
    centre = torch.tanh(x / variance)  # the posterior mean of the component's centre
    return (centre * sigma**2 + x * SPREAD**2) / variance


def component(x, sigma):
    """E[x0 | x] of N(1, s^2)."""
    return (sigma**2 + x * SPREAD**2) / (SPREAD**2 + sigma**2)


@pytest.fixture
def exact(prior):
    """A model whose prediction is exact: the known component in some channels, the mixture elsewhere."""

    def make(known):
        def denoise(apply_model, args):
            x, sigma = args["input"], args["timestep"].reshape(-1, 1, 1, 1)
            knows = torch.zeros(1, 4, 1, 1, dtype=torch.bool)
            knows[:, list(known)] = True
            return torch.where(knows, component(x, sigma), mixture(x, sigma))

        clone = prior.clone()
        clone.set_model_unet_function_wrapper(denoise)
        return clone

    return make


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_sde"])
def test_product_of_two_attributes(gcfg, exact, prompt, sampler):
    terms = [GuidanceTerm(1.0, model=exact((0, 2))), GuidanceTerm(1.0, model=exact((1, 3)))]
    image = {"samples": torch.zeros(64, 4, 8, 8)}
    x = 0.18215 * gcfg(exact(()), prompt(0), terms, image, steps=40, sampler=sampler, scheduler="karras")
    for channel in range(4):
        assert float(x[:, channel].mean()) == pytest.approx(1.0, abs=MEAN_TOLERANCE)
        assert float(x[:, channel].std()) == pytest.approx(SPREAD, abs=SPREAD_TOLERANCE)


def test_one_attribute_leaves_the_other_free(gcfg, exact, prompt):
    image = {"samples": torch.zeros(64, 4, 8, 8)}
    terms = [GuidanceTerm(1.0, model=exact((0, 2)))]
    x = 0.18215 * gcfg(exact(()), prompt(0), terms, image, steps=40, scheduler="karras")
    assert float(x[:, 0].mean()) == pytest.approx(1.0, abs=MEAN_TOLERANCE)
    for channel in (1, 3):
        share = float((x[:, channel] > 0).float().mean())
        assert share == pytest.approx(0.5, abs=4 * 0.5 / 64 + 0.01)
        assert float(x[:, channel].abs().mean()) == pytest.approx(1.0, abs=MEAN_TOLERANCE)


def test_negative_weight_pushes_away(gcfg, exact, prompt):
    """A negative weight lowers the attribute's share where it is known and nowhere else."""
    image = {"samples": torch.zeros(64, 4, 8, 8)}
    terms = [GuidanceTerm(-1.0, model=exact((0, 2)))]
    x = 0.18215 * gcfg(exact(()), prompt(0), terms, image, steps=40, scheduler="karras")
    assert float((x[:, 0] > 0).float().mean()) < 0.25
    assert float((x[:, 1] > 0).float().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 64 + 0.01)
