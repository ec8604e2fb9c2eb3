"""Every architecture that ComfyUI runs, small and with random weights, against stock sampling of the same models."""

import runpy
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.gcfg.guidance_cache import CacheRule
from comfyui_gcfg.gcfg.terms import GuidanceTerm

FAMILIES = runpy.run_path(str(Path(__file__).with_name("zoo.py")))["FAMILIES"]

# Sums of the same float32 predictions in another order, and rows of batches of other sizes.
REORDERED = 1e-4


class Animal:
    """A family with its models, its conditionings and samplers for both sides of a comparison."""

    def __init__(self, name, stock, gcfg):
        self.family = FAMILIES[name]
        self.prior, self.concept = self.family.model(0), self.family.model(1)
        self.empty, self.text, self.other = (self.family.conditioning(seed) for seed in range(3))
        self._stock, self._gcfg = stock, gcfg

    def stock(self, positive, negative, cfg, latent=None, model=None, **settings):
        settings = {"steps": 2, "scheduler": "simple", **settings}
        latent = self.family.latent() if latent is None else latent
        return streams(self._stock(model or self.prior, positive, negative, latent, cfg=cfg, **settings))

    def gcfg(self, terms, latent=None, model=None, **settings):
        settings = {"steps": 2, "scheduler": "simple", **settings}
        latent = self.family.latent() if latent is None else latent
        return streams(self._gcfg(model or self.prior, self.empty, terms, latent, **settings))

    def denoised(self, conditioning, model=None, latent=None):
        """D at the first noise level: one Euler step to sigma 0 returns it."""
        return self.stock(conditioning, conditioning, 1.0, latent, model, steps=1)


@pytest.fixture(scope="module", params=FAMILIES)
def animal(request, comfy, stock, gcfg):
    with torch.inference_mode():
        try:
            return Animal(request.param, stock, gcfg)
        except LookupError as missing:
            pytest.skip(str(missing))


@pytest.fixture(scope="module")
def rows_apart(animal):
    """Where a model mixes the rows of a batch, not even stock CFG is the sum of its predictions (ACE on 0.3.64)."""
    base, text = animal.denoised(animal.empty), animal.denoised(animal.text)
    whole = animal.stock(animal.text, animal.empty, 3.0, steps=1)
    if not close(whole, added(base, (text, everywhere(animal, 3.0)))):
        pytest.skip("in this ComfyUI a prediction depends on what else is in its batch, in stock as well")


def streams(latent):
    return list(latent.unbind()) if getattr(latent, "is_nested", False) else [latent]


def equal(a, b):
    assert all(torch.isfinite(part).all() and float(part.std()) > 0 for part in b)
    return all(map(torch.equal, a, b))


def close(a, b):
    assert all(torch.isfinite(part).all() and float(part.std()) > 0 for part in b)
    return all(float((x - y).abs().max()) <= REORDERED * float(y.abs().max()) for x, y in zip(a, b, strict=True))


def added(base, *weighted):
    """D_0 + sum_i w_i m_i (D_i - D_0), by hand and in float64."""
    total = [part.double() for part in base]
    for prediction, weights in weighted:
        for place, weight in enumerate(weights):
            total[place] = total[place] + weight * (prediction[place].double() - base[place].double())
    return [part.float() for part in total]


def everywhere(animal, weight):
    return [weight] * len(animal.family.shapes)


def test_one_term_is_stock_cfg(animal):
    got = animal.gcfg([GuidanceTerm(4.0, conditioning=animal.text)])
    assert equal(got, animal.stock(animal.text, animal.empty, 4.0))


def test_a_pair_is_a_negative_prompt(animal):
    terms = [GuidanceTerm(4.0, conditioning=animal.text), GuidanceTerm(-3.0, conditioning=animal.other)]
    assert equal(animal.gcfg(terms), animal.stock(animal.text, animal.other, 4.0))


@pytest.mark.usefixtures("rows_apart")
def test_two_models_by_hand(animal):
    terms = [
        GuidanceTerm(3.0, conditioning=animal.text),
        GuidanceTerm(1.5, model=animal.concept, conditioning=animal.other),
    ]
    expected = added(
        animal.denoised(animal.empty),
        (animal.denoised(animal.text), everywhere(animal, 3.0)),
        (animal.denoised(animal.other, animal.concept), everywhere(animal, 1.5)),
    )
    assert close(animal.gcfg(terms, steps=1), expected)


@pytest.mark.usefixtures("rows_apart")
def test_a_mask_is_that_of_stock_noise_masks(animal, comfy):
    shape = animal.family.shapes[0]
    mask = torch.rand(shape[1] if len(shape) == 4 else 1, 6, 5, generator=torch.Generator().manual_seed(3))
    term = GuidanceTerm(3.0, model=animal.concept, conditioning=animal.text, mask=mask)
    if len(shape) == 2:
        with pytest.raises(ValueError, match=r"^Guidance Term '1': mask has a height and a width, expected none"):
            animal.gcfg([term], steps=1)
        return
    base = animal.denoised(animal.empty)
    fitted = comfy.sampler_helpers.prepare_mask(mask, base[0].shape, "cpu")
    weights = [3.0 * fitted, *[3.0] * (len(base) - 1)]
    expected = added(base, (animal.denoised(animal.text, animal.concept), weights))
    assert close(animal.gcfg([term], steps=1), expected)


@pytest.mark.usefixtures("rows_apart")
def test_stream_weights(animal):
    last = str(len(animal.family.shapes))
    term = GuidanceTerm(3.0, model=animal.concept, conditioning=animal.text, stream_weights={last: 0.5})
    weights = [*[3.0] * (len(animal.family.shapes) - 1), 1.5]
    expected = added(animal.denoised(animal.empty), (animal.denoised(animal.text, animal.concept), weights))
    assert close(animal.gcfg([term], steps=1), expected)


def test_a_batch(animal):
    if not animal.family.batches:
        pytest.skip("the model evaluates one latent at a time")
    latent = animal.family.latent(batch=2)
    got = animal.gcfg([GuidanceTerm(4.0, conditioning=animal.text)], latent)
    assert equal(got, animal.stock(animal.text, animal.empty, 4.0, latent))
    assert len(got[0]) == 2


def test_img2img(animal):
    latent = animal.family.latent(seed=7)
    settings = {"steps": 4, "denoise": 0.5}
    got = animal.gcfg([GuidanceTerm(4.0, conditioning=animal.text)], latent, **settings)
    assert equal(got, animal.stock(animal.text, animal.empty, 4.0, latent, **settings))


@pytest.mark.usefixtures("rows_apart")
def test_a_lora_clone_as_a_term(animal):
    weights = {key: value for key, value in animal.prior.model.state_dict().items() if value.ndim == 2}
    changed = animal.prior.clone()
    generator = torch.Generator().manual_seed(5)
    patches = {key: (0.1 * torch.randn(value.shape, generator=generator),) for key, value in weights.items()}
    changed.add_patches(patches, 1.0)
    alone = animal.denoised(animal.text, changed)
    terms = [
        GuidanceTerm(3.0, conditioning=animal.text),
        GuidanceTerm(1.5, model=changed, conditioning=animal.text),
    ]
    got = animal.gcfg(terms, steps=1)
    base, plain = animal.denoised(animal.empty), animal.denoised(animal.text)
    assert not close(alone, plain)
    assert close(got, added(base, (plain, everywhere(animal, 3.0)), (alone, everywhere(animal, 1.5))))


def test_guidance_cache(animal):
    def terms(rule):
        return [
            GuidanceTerm(3.0, conditioning=animal.text),
            GuidanceTerm(1.5, model=animal.concept, conditioning=animal.other, cache_rule=rule),
        ]

    calls = []
    handle = animal.concept.model.diffusion_model.register_forward_pre_hook(lambda *args: calls.append(1))
    try:
        whole = animal.gcfg(terms(None), steps=4)
        assert equal(animal.gcfg(terms(CacheRule(1)), steps=4), whole)
        calls.clear()
        half = animal.gcfg(terms(CacheRule(2)), steps=4)
    finally:
        handle.remove()
    assert len(calls) < 4
    assert all(torch.isfinite(part).all() for part in half)
    assert not close(half, whole)


def test_cells_of_a_sweep_are_runs(animal):
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider
    from comfyui_gcfg.nodes.runtime.ksampler import sample_cells

    def terms(weight):
        return [
            GuidanceTerm(weight, conditioning=animal.text),
            GuidanceTerm(1.5, model=animal.concept, conditioning=animal.other),
        ]

    guiders = [GCFGGuider(animal.prior, animal.empty, terms(weight), "Weight Sweep") for weight in (2.0, 5.0)]
    settings = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "simple"}
    cells = streams(sample_cells(guiders, animal.family.latent(), **settings)["samples"])
    for place, weight in enumerate((2.0, 5.0)):
        assert equal([part[place : place + 1] for part in cells], animal.gcfg(terms(weight)))
