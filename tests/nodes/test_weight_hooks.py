"""LoRAs that act on one conditioning only (ComfyUI's hooks), where the version has them."""

import gc

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import relative
from comfyui_gcfg.testkit.models import lora_state_dict


@pytest.fixture
def hooked(comfy, weights):
    """A conditioning that brings a LoRA, as Create Hook LoRA + Cond Set Props make it."""
    try:
        import comfy.hooks
    except ModuleNotFoundError:
        pytest.skip("this ComfyUI has no hooks")

    def make(conditioning, seed, strength=1.0):
        group = comfy.hooks.create_hook_lora(lora_state_dict(weights("sd15", 0), seed), strength, 0.0)
        return comfy.hooks.set_hooks_for_conditioning(conditioning, group)

    return make


def test_one_hooked_term_equals_stock(gcfg, stock, prior, prompt, latent, hooked):
    positive = hooked(prompt(1), 1)
    expected = stock(prior, positive, prompt(2), latent)
    assert torch.equal(gcfg(prior, prompt(2), [GuidanceTerm(7.5, conditioning=positive)], latent), expected)
    assert not torch.equal(expected, stock(prior, prompt(1), prompt(2), latent))


def test_hook_equals_a_model_with_that_lora(gcfg, comfy, load_unet, weights, lora, prior, prompt, latent, hooked):
    """A hooked term on the base, beside a term on a clone with another LoRA: the same as two separate models."""

    clean = {key: value.clone() for key, value in prior.model.state_dict().items()}
    terms = [
        GuidanceTerm(4.0, conditioning=hooked(prompt(1), 1)),
        GuidanceTerm(2.0, model=lora(prior, 2), conditioning=prompt(3)),
    ]
    got = gcfg(prior, prompt(0), terms, latent)
    separate = [
        GuidanceTerm(4.0, model=lora(load_unet(weights()), 1), conditioning=prompt(1)),
        GuidanceTerm(2.0, model=lora(load_unet(weights()), 2), conditioning=prompt(3)),
    ]
    expected = gcfg(prior, prompt(0), separate, latent)
    assert relative(got, expected) < 1e-5
    comfy.model_management.unload_all_models()
    assert all(torch.equal(value, clean[key]) for key, value in prior.model.state_dict().items())
    gc.collect()


def test_hooks_of_one_term_do_not_leak_into_a_clone_of_equal_weights(gcfg, prior, prompt, latent, hooked):
    """Two lanes on one module: the other lane's step begins with the hooked weights taken back."""
    other = prior.clone()
    other.set_model_attn2_patch(lambda n, k, v, extra: (n, k, v))  # other options, same weights: a lane of its own
    terms = [
        GuidanceTerm(4.0, conditioning=hooked(prompt(1), 1)),
        GuidanceTerm(2.0, model=other, conditioning=prompt(3)),
    ]
    got = gcfg(prior, prompt(0), terms, latent)
    plain = [terms[0], GuidanceTerm(2.0, conditioning=prompt(3))]
    expected = gcfg(prior, prompt(0), plain, latent)
    assert relative(got, expected) < 1e-5


def test_both_terms_hooked_differently(gcfg, load_unet, weights, lora, prior, concept, prompt, latent, hooked):
    terms = [
        GuidanceTerm(4.0, conditioning=hooked(prompt(1), 1)),
        GuidanceTerm(2.0, model=concept, conditioning=hooked(prompt(3), 2)),
    ]
    got = gcfg(prior, prompt(0), terms, latent)

    separate = [
        GuidanceTerm(4.0, model=lora(load_unet(weights()), 1), conditioning=prompt(1)),
        GuidanceTerm(2.0, model=lora(load_unet(weights("sd15", 1)), 2), conditioning=prompt(3)),
    ]
    expected = gcfg(prior, prompt(0), separate, latent)
    assert relative(got, expected) < 1e-5
    assert torch.equal(got, gcfg(prior, prompt(0), terms, latent)), "and again"


@pytest.mark.parametrize("where", ["outer_sample", "prepare_sampling", "sampler_sample"])
def test_a_term_that_fails_before_it_samples_keeps_no_hook(gcfg, prior, concept, prompt, latent, hooked, where):
    """Its hooks are registered on its model before its wrappers run, which may raise before anything is loaded."""

    def failing(executor, *args, **kwargs):
        raise RuntimeError("a wrapper that fails")

    term = concept.clone()
    term.add_wrapper(where, failing)
    other = concept.clone()
    other.set_model_attn2_patch(lambda n, k, v, extra: (n, k, v))
    before = [dict(model.hook_patches) for model in (term, other, prior)]
    terms = [
        GuidanceTerm(2.0, model=other, conditioning=hooked(prompt(1), 2)),
        GuidanceTerm(2.0, model=term, conditioning=hooked(prompt(3), 1)),
    ]
    expected = gcfg(prior, prompt(0), [GuidanceTerm(2.0, model=concept, conditioning=prompt(3))], latent, steps=1)
    with pytest.raises(RuntimeError, match="a wrapper that fails"):
        gcfg(prior, prompt(0), terms, latent, steps=1)
    assert [dict(model.hook_patches) for model in (term, other, prior)] == before
    again = gcfg(prior, prompt(0), [GuidanceTerm(2.0, model=concept, conditioning=prompt(3))], latent, steps=1)
    assert torch.equal(again, expected)
