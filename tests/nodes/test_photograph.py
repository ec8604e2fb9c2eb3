"""img2img and inpainting on a real photograph, encoded and decoded by a VAE, against the stock KSampler."""

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.models import vae_state_dict


@pytest.fixture(scope="module")
def vae(comfy):
    return comfy.sd.VAE(sd={key: value.clone() for key, value in vae_state_dict().items()})


@pytest.fixture(scope="module")
def photograph():
    """The roofs of scikit-learn's china.jpg as a ComfyUI IMAGE, (1, 128, 192, 3) in 0..1."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).float() / 255
    return torch.nn.functional.interpolate(pixels.permute(2, 0, 1)[None], (128, 192), mode="area").permute(0, 2, 3, 1)


@pytest.mark.parametrize("inpaint", [False, True], ids=["img2img", "inpaint"])
def test_photograph(gcfg, stock, prior, concept, prompt, vae, photograph, inpaint):
    with torch.inference_mode():
        latent = {"samples": vae.encode(photograph)}
    assert latent["samples"].shape == (1, 4, 16, 24)
    if inpaint:
        latent["noise_mask"] = torch.zeros(1, 128, 192)
        latent["noise_mask"][..., 96:] = 1.0
    control = GuidanceTerm(7.5, conditioning=prompt(1))
    expected = stock(prior, prompt(1), prompt(2), latent, denoise=0.5, sampler="dpmpp_2m", scheduler="karras")
    got = gcfg(prior, prompt(2), [control], latent, denoise=0.5, sampler="dpmpp_2m", scheduler="karras")
    assert torch.equal(got, expected)

    both = gcfg(prior, prompt(2), [control, GuidanceTerm(1.5, model=concept)], latent, denoise=0.5)
    image = vae.decode(both)
    assert image.shape == photograph.shape
    assert torch.isfinite(image).all()
    unchanged = vae.decode(latent["samples"])
    change = (image - unchanged).abs().mean(dim=(0, 1, 3))  # by column
    assert float(change[120:].mean()) > 0.02
    if inpaint:  # the decoder sees a few pixels around the edge of the mask
        assert float(change[:72].max()) < 1e-3
