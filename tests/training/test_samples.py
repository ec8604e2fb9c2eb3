"""The sample grid's sampling, beside diffusers' scheduler driven in eps by hand, and an exact Gaussian."""

import pytest
import torch
from comfyui_gcfg.training.objective import Objective
from comfyui_gcfg.training.picture_grid import labelled_grid
from comfyui_gcfg.training.sampling import guided, sample, starting_noise
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

SHAPE = (4, 8, 8)


def gaussian(objective, mean, std):
    """The exact denoiser of latents that are normal with this mean and standard deviation."""

    def denoised(x, t):
        alpha, sigma = objective.alpha_sigma(t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoised


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5, -1.0])
def test_guidance_equals_the_sum_in_eps(weight):
    """Eq. 3 in eps, by the scheduler's own eps mode: neither combine() nor `denoised` has a part in it."""
    objective = Objective.of("eps")
    prior, concept = gaussian(objective, 0.5, 1.0), gaussian(objective, -1.0, 0.3)
    x = starting_noise([0, 1], SHAPE)
    found = sample(guided(prior, concept, weight), x, objective, steps=12)

    scheduler = DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type="epsilon")
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t].sqrt()
        sigma = (1 - scheduler.alphas_cumprod[t]).sqrt()
        times = t.expand(2)
        eps_prior, eps_concept = ((x - alpha * model(x, times)) / sigma for model in (prior, concept))
        x = scheduler.step(eps_prior + weight * (eps_concept - eps_prior), t, x).prev_sample
    torch.testing.assert_close(found, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("prediction", "zero"), [("eps", False), ("v", False), ("v", True), ("flow", False)])
def test_the_samples_of_a_gaussian_have_its_mean_and_spread(prediction, zero):
    objective = Objective.of(prediction, zero)
    model = gaussian(objective, 1.5, 0.5)
    latents = sample(guided(model, model, 0.0), starting_noise(range(64), SHAPE), objective, steps=50)
    assert latents.mean() == pytest.approx(1.5, abs=0.05)
    assert latents.std() == pytest.approx(0.5, rel=0.05)


def test_only_the_models_that_count_are_evaluated():
    def unused(x, t):
        raise AssertionError("evaluated")

    objective = Objective.of("eps")
    model = gaussian(objective, 0.0, 1.0)
    x = starting_noise([0], SHAPE)
    alone = sample(guided(model, unused, 0.0), x, objective, 4)
    assert torch.equal(alone, sample(guided(unused, model, 1.0), x, objective, 4))


def test_each_seed_has_its_noise_whatever_stands_beside_it():
    assert torch.equal(starting_noise([5, 3], SHAPE)[1], starting_noise([3], SHAPE)[0])


def test_the_grid_has_a_captioned_row_for_each_weight():
    colours = [["red", "lime"], ["blue", "black"], ["white", "gray"]]
    rows = [(f"w = {i}", [Image.new("RGB", (40, 30), c) for c in row]) for i, row in enumerate(colours)]
    whole = labelled_grid(rows)
    assert whole.size == (80, 3 * whole.height // 3)
    height = whole.height // 3
    for i, row in enumerate(colours):
        for j, colour in enumerate(row):
            cell = whole.crop((40 * j, i * height + height - 30, 40 * j + 40, i * height + height))
            assert cell.getcolors() == [(1200, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))]
        caption = whole.crop((0, i * height, 40, i * height + height - 30))
        assert len(caption.convert("L").point(lambda v: 255 * (v > 128)).getcolors()) == 2  # there is writing on it
