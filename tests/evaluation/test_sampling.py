"""Sampling around one base: beside diffusers' scheduler driven in eps by hand, and its own networks."""

from copy import deepcopy

import pytest
import torch
from comfyui_gcfg.evaluation.sampling import Guidance, Predictor, controlled, decode, denoiser, take_hints
from comfyui_gcfg.training.attention import SharedPromptAttention, share_prompts
from comfyui_gcfg.training.concept import predict
from comfyui_gcfg.training.objective import Objective
from comfyui_gcfg.training.prior.text_encoder import Conditions
from comfyui_gcfg.training.sampling import decode as decode_one_by_one
from comfyui_gcfg.training.sampling import sample, starting_noise
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

SHAPE = (4, 4, 4)
TEXT = Conditions(torch.zeros(1, 1, 1))


class Gaussian(torch.nn.Module):
    """The exact eps of latents that are normal with this mean and standard deviation; it counts its calls."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std, self.calls = torch.nn.Parameter(torch.tensor(mean)), std, 0

    def forward(self, x, t, encoder_hidden_states, return_dict):
        self.calls += 1
        alpha, sigma = Objective.of("eps").alpha_sigma(t)
        mean = self.mean.detach()
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return ((x - alpha * (mean + gain * (x - alpha * mean))) / sigma,)


def test_any_number_of_terms_equals_the_sum_in_eps():
    """Eq. 3 in eps, by the scheduler's own eps mode: neither combine() nor `denoised` has a part in it."""
    objective = Objective.of("eps")
    base, *terms = networks = Gaussian(0.5, 1.0), Gaussian(-1.0, 0.3), Gaussian(0.2, 0.7), Gaussian(2.0, 1.5)
    weights = (1.5, 2.25, -0.5)
    guidance = Guidance(Predictor(base, TEXT), tuple(Predictor(term, TEXT) for term in terms), weights)
    x = starting_noise([0, 1], SHAPE)
    found = sample(denoiser(guidance, objective), x, objective, steps=12)

    scheduler = DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type="epsilon")
    scheduler.set_timesteps(12)
    for t in scheduler.timesteps:
        eps, *others = (network(x, t.expand(2), None, False)[0] for network in networks)
        x = scheduler.step(eps + sum(w * (e - eps) for w, e in zip(weights, others, strict=True)), t, x).prev_sample
    torch.testing.assert_close(found, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("weights", "calls"),
    [((1.5, 2.0), (4, 4, 4)), ((1.0, 0.0), (0, 4, 0)), ((0.0, 0.0), (4, 0, 0)), ((3.0, -2.0), (0, 4, 4))],
)
def test_only_what_counts_is_evaluated(weights, calls):
    networks = [Gaussian(mean, 1.0) for mean in (0.0, 1.0, 2.0)]
    base, *terms = (Predictor(network, TEXT) for network in networks)
    sample(
        denoiser(Guidance(base, tuple(terms), weights), Objective.of("eps")),
        starting_noise([0], SHAPE),
        Objective.of("eps"),
        4,
    )
    assert tuple(network.calls for network in networks) == calls


def test_what_two_terms_share_is_evaluated_once():
    network, other = Gaussian(0.0, 1.0), Conditions(torch.ones(1, 1, 1))
    once = Predictor(network, TEXT)
    guidance = Guidance(once, (Predictor(network, TEXT), Predictor(network, other)), (2.0, 0.5))
    sample(denoiser(guidance, Objective.of("eps")), starting_noise([0], SHAPE), Objective.of("eps"), 4)
    assert network.calls == 2 * 4


@pytest.fixture
def shared_unet(tiny_unet):
    """The tiny UNet with the processor, beside which the plain one stays as it is."""
    unet = UNet2DConditionModel.from_config(tiny_unet.config).eval()
    unet.load_state_dict(tiny_unet.state_dict())
    share_prompts(unet, keep=True)
    return unet


def test_a_shared_prompt_changes_nothing(tiny_unet, shared_unet):
    """For each of several prompts in turn; to rounding, as a kernel may split the longer sequence otherwise."""
    assert any(isinstance(each, SharedPromptAttention) for each in shared_unet.attn_processors.values())
    x = starting_noise(range(3), (4, 8, 8))
    texts = [Conditions(torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    with torch.inference_mode():
        for text, t in [(texts[0], 900), (texts[1], 900), (texts[0], 10)]:
            times = torch.full((3,), t)
            found, expected = (predict(unet, x, times, text) for unet in (shared_unet, tiny_unet))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_keys_and_values_are_computed_once_for_each_prompt(shared_unet):
    calls = []
    block = shared_unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    block.to_k.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    x = starting_noise(range(3), (4, 8, 8))
    texts = [Conditions(torch.randn(1, 77, 32)) for _ in range(2)]
    with torch.inference_mode():
        for t in (900, 500, 10):
            for text in texts:
                predict(shared_unet, x, torch.full((3,), t), text)
    assert calls == [(1, 77, 32)] * 2


def test_a_batch_of_different_texts_is_refused(shared_unet):
    with pytest.raises(ValueError, match="the texts of a batch differ"):
        shared_unet(starting_noise(range(3), (4, 8, 8)), 5, torch.randn(3, 77, 32))


def test_a_controlnet_beside_the_pipelines_way(tiny_unet, controlnet):
    """Its residuals reach the network; terms of one text share them; the condition's layers run once a batch."""
    x, times = starting_noise(range(2), SHAPE), torch.full((2,), 700)
    texts = [Conditions(torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    condition = torch.rand(2, 3, 32, 32)
    stripped = deepcopy(controlnet)
    layers = take_hints(stripped)
    calls = []
    stripped.register_forward_hook(lambda module, args, output: calls.append(1))
    guidance = Guidance(Predictor(tiny_unet, texts[0], texts[1]), (Predictor(tiny_unet, texts[1], texts[1]),), (2.0,))
    objective = Objective.of("eps")
    with torch.inference_mode():
        found = denoiser(guidance, objective, controlled(stripped, layers(condition)))(x, times)
        outputs = []
        for text in texts:
            down, middle = controlnet(
                x, times, texts[1].context.expand(2, -1, -1), controlnet_cond=condition, return_dict=False
            )
            outputs.append(
                tiny_unet(
                    x,
                    times,
                    text.context.expand(2, -1, -1),
                    down_block_additional_residuals=down,
                    mid_block_additional_residual=middle,
                ).sample
            )
        plain = tiny_unet(x, times, texts[0].context.expand(2, -1, -1)).sample
        expected = objective.denoised(x, outputs[0] + 2 * (outputs[1] - outputs[0]), times)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs[0], plain, atol=1e-2)
    assert len(calls) == 1


def test_decoding_in_batches_equals_one_by_one(tiny_vae, monkeypatch):
    latents = starting_noise(range(5), SHAPE)
    whole = decode(tiny_vae, latents)
    monkeypatch.setattr("comfyui_gcfg.evaluation.sampling._DECODED_PIXELS", 2 * 32 * 32)
    parts = decode(tiny_vae, latents)
    singles = torch.stack(
        [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in decode_one_by_one(tiny_vae, latents)]
    )
    singles = singles.view(5, 32, 32, 3).permute(0, 3, 1, 2)
    for images in (whole, parts):
        assert images.dtype == torch.uint8
        assert (images.int() - singles.int()).abs().max() <= 1
    assert singles.float().std() > 1
