"""Targets, estimates and weights of the three predictions, beside diffusers' schedulers and exact numbers."""

import numpy as np
import pytest
import torch
from comfyui_gcfg.training.objective import Objective
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

T = torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.fixture
def x0():
    return torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stable_diffusion():
    """The scheduler_config.json of SD1.5."""
    return DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_noised_latents_and_targets_are_those_of_diffusers(stable_diffusion, x0, noise, prediction):
    objective = Objective.of(prediction)
    torch.testing.assert_close(objective.noised(x0, noise, T), stable_diffusion.add_noise(x0, noise, T))
    expected = noise if prediction == "eps" else stable_diffusion.get_velocity(x0, noise, T)
    torch.testing.assert_close(objective.target(x0, noise, T), expected)


def test_zero_terminal_snr_ends_in_pure_noise(x0, noise):
    objective = Objective.of("v", zero_terminal_snr=True)
    assert torch.equal(objective.noised(x0, noise, T)[5], noise[5])
    assert torch.equal(objective.target(x0, noise, T)[5], -x0[5])
    assert not torch.equal(Objective.of("v").noised(x0, noise, T)[5], noise[5])


def test_flow_is_a_straight_line(x0, noise):
    objective = Objective.of("flow")
    u = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.999])
    t = objective.timesteps(u)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(timesteps=t.tolist()[::-1])
    torch.testing.assert_close(t, 1000 * u)
    torch.testing.assert_close(objective.noised(x0, noise, t), scheduler.scale_noise(x0, t, noise))
    line = (objective.noised(x0, noise, t + 1) - objective.noised(x0, noise, t)) * 1000
    torch.testing.assert_close(line, objective.target(x0, noise, t), atol=2e-3, rtol=0)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_right_output_denoises_to_the_image(x0, noise, prediction):
    objective = Objective.of(prediction)
    t = T[:5] if prediction == "flow" else T
    n = len(t)
    x = objective.noised(x0[:n], noise[:n], t)
    denoised = objective.denoised(x, objective.target(x0[:n], noise[:n], t), t)
    torch.testing.assert_close(denoised, x0[:n], atol=2e-4, rtol=0)


def test_timesteps_are_all_met_alike():
    u = (torch.arange(10_000) + 0.5) / 10_000
    assert Objective.of("eps").timesteps(u).bincount().tolist() == [10] * 1000


@pytest.mark.parametrize(("prediction", "below"), [("eps", 0), ("v", 1)])
def test_min_snr_weights(stable_diffusion, prediction, below):
    snr = compute_snr(stable_diffusion, T).double().numpy()
    expected = np.minimum(snr, 5) / (snr + below)
    weights = Objective.of(prediction).loss_weights(T, 5.0)
    np.testing.assert_allclose(weights.double().numpy(), expected, rtol=1e-4)
    assert Objective.of(prediction).loss_weights(T, 0.0).tolist() == [1.0] * 6


def test_min_snr_weights_where_nothing_but_noise_is_left():
    assert Objective.of("v", zero_terminal_snr=True).loss_weights(T, 5.0)[5] == 0
