"""`cond_or_uncond`: what patches see of a call is what they see in stock sampling."""

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import relative


@pytest.fixture
def seen():
    return []


@pytest.fixture
def reading(prior, seen):
    """A model with a patch that reads the index, as IPAdapter and its kind do."""

    def patch(n, k, v, extra):
        seen.append(tuple(extra["cond_or_uncond"]))
        return n, k, v

    clone = prior.clone()
    clone.set_model_attn2_patch(patch)
    return clone


def terms(prompt, *weights):
    return [GuidanceTerm(weight, conditioning=prompt(seed)) for seed, weight in enumerate(weights, start=1)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((3.0,), {(1, 0)}),
        ((1.0,), {(0,)}),
        ((5.0, -4.0), {(1, 0)}),
        ((3.0, 2.0), {(1, 0)}),
        ((3.0, 2.0, -1.0), {(1, 0)}),
    ],
    ids=["K=1", "K=1 of weight 1", "pair", "K=2", "K=3"],
)
def test_a_patch_that_reads_it(gcfg, prior, reading, seen, prompt, latent, given, expected):
    got = gcfg(reading, prompt(0), terms(prompt, *given), latent, steps=2)
    assert set(seen) == expected
    plain = gcfg(prior, prompt(0), terms(prompt, *given), latent, steps=2)
    assert relative(got, plain) < 2e-5


def test_where_no_term_acts(gcfg, reading, seen, prompt, latent):
    late = GuidanceTerm(3.0, start_percent=0.9, conditioning=prompt(1))
    gcfg(reading, prompt(0), [late], latent, steps=2)
    assert (1,) in set(seen)


def test_the_unconditional_comes_first_in_one_batch(gcfg, prior, seen, prompt, latent):
    """A patch whose code does not name the index leaves the batch whole."""

    def patch(n, k, v, extra):
        seen.append(tuple(extra["".join(("cond_or", "_uncond"))]))
        return n, k, v

    clone = prior.clone()
    clone.set_model_attn2_patch(patch)
    gcfg(clone, prompt(0), terms(prompt, 3.0, 2.0), latent, steps=1)
    gcfg(clone, prompt(0), terms(prompt, 3.0, 2.0, -1.0), latent, steps=1)
    assert set(seen) == {(1, 0, 0), (1, 0, 0, 0)}


class Callable:
    """A patch that is an object, whose method calls a function of its module."""

    def __call__(self, n, k, v, extra):
        return _through(n, k, v, extra)


def _through(n, k, v, extra):
    assert len(extra["cond_or_uncond"]) <= 2
    return n, k, v


class Holder:
    """IPAdapter's form: an object that holds functions in a list."""

    def __init__(self):
        self.callbacks = [_through]

    def __call__(self, n, k, v, extra):
        for callback in self.callbacks:
            n, k, v = callback(n, k, v, extra)
        return n, k, v


def closure():
    inner = _through
    return lambda n, k, v, extra: inner(n, k, v, extra)


@pytest.mark.parametrize("make", [Callable, Holder, closure])
def test_forms_of_patches(gcfg, prior, prompt, latent, make):
    clone = prior.clone()
    clone.set_model_attn2_patch(make())
    got = gcfg(clone, prompt(0), terms(prompt, 3.0, 2.0), latent, steps=1)
    assert torch.isfinite(got).all()


def test_attention_guidance_acts_on_each_of_two_terms(gcfg, stock, prior, prompt, latent):
    """A patch that mixes the two halves of a call, and wants the unconditional at every weight."""

    def mix(out, extra):
        found = extra["cond_or_uncond"]
        if sorted(found) != [0, 1]:
            return out
        halves = list(out.chunk(2))
        cond, uncond = found.index(0), found.index(1)
        halves[cond] = halves[cond] + 0.5 * (halves[cond] - halves[uncond])
        return torch.cat(halves)

    clone = prior.clone()
    clone.set_model_attn1_output_patch(mix)
    clone.model_options["disable_cfg1_optimization"] = True
    one, two = (stock(clone, prompt(s), prompt(0), latent, cfg=1.0, steps=1) for s in (1, 2))
    plain = stock(prior, prompt(0), prompt(0), latent, cfg=1.0, steps=1)
    expected = plain + 3.0 * (one - plain) + 2.0 * (two - plain)
    got = gcfg(clone, prompt(0), terms(prompt, 3.0, 2.0), latent, steps=1)
    assert relative(got, expected) < 2e-5
    without = gcfg(prior, prompt(0), terms(prompt, 3.0, 2.0), latent, steps=1)
    assert float((got - without).abs().max() / expected.abs().max()) > 1e-3
