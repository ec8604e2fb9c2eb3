"""Hooks written for two predictions act on the sum as they do in stock guidance."""

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import relative


def rescale(args):
    """A `sampler_cfg_function`, as RescaleCFG sets it: works on x - denoised."""
    cond, uncond, scale = args["cond"], args["uncond"], args["cond_scale"]
    guided = uncond + scale * (cond - uncond)
    return 0.3 * guided * cond.std() / guided.std() + 0.7 * guided


def post(args):
    """A post-cfg hook that reads every documented argument."""
    assert set(args) >= {"denoised", "cond", "uncond", "model", "uncond_denoised", "cond_denoised", "sigma", "input"}
    return args["denoised"] + 0.1 * (args["cond_denoised"] - args["uncond_denoised"]) * len(args["cond"])


def pre(args):
    """A pre-cfg hook that swaps part of the predictions."""
    assert set(args) >= {"conds", "conds_out", "cond_scale", "timestep", "input", "sigma", "model", "model_options"}
    cond, uncond = args["conds_out"]
    return [cond, 0.9 * uncond + 0.1 * cond]


def again(args):
    """A post-cfg hook that evaluates the model again, as perturbed attention and SAG do."""
    import comfy.samplers

    (other,) = comfy.samplers.calc_cond_batch(
        args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
    )
    return args["denoised"] + 0.5 * (args["cond_denoised"] - 0.9 * other)


HOOKS = {
    "cfg function": lambda m: m.set_model_sampler_cfg_function(rescale),
    "cfg function, uncond wanted": lambda m: m.set_model_sampler_cfg_function(rescale, disable_cfg1_optimization=True),
    "post": lambda m: m.set_model_sampler_post_cfg_function(post),
    "again": lambda m: m.set_model_sampler_post_cfg_function(again),
    "pre": lambda m: m.set_model_sampler_pre_cfg_function(pre),
}


@pytest.fixture(params=HOOKS)
def hooked(request, prior):
    clone = prior.clone()
    if request.param == "pre" and not hasattr(clone, "set_model_sampler_pre_cfg_function"):
        clone.model_options["sampler_pre_cfg_function"] = []
        pytest.skip("this ComfyUI has no pre-cfg hook")
    HOOKS[request.param](clone)
    return clone


@pytest.mark.parametrize("cfg", [7.5, 1.0])
def test_one_term_equals_stock(gcfg, stock, prior, hooked, prompt, latent, cfg):
    expected = stock(hooked, prompt(1), prompt(2), latent, cfg=cfg)
    assert torch.equal(gcfg(hooked, prompt(2), [GuidanceTerm(cfg, conditioning=prompt(1))], latent), expected)


def test_hook_acts(gcfg, prior, hooked, prompt, latent):
    terms = [GuidanceTerm(7.5, conditioning=prompt(1))]
    assert not torch.equal(gcfg(hooked, prompt(2), terms, latent), gcfg(prior, prompt(2), terms, latent))


def test_two_halves_equal_the_whole(gcfg, hooked, prompt, latent):
    """The same term split in two is the same guidance, hooks included."""
    whole = gcfg(hooked, prompt(2), [GuidanceTerm(7.5, conditioning=prompt(1))], latent)
    halves = [GuidanceTerm(3.75, conditioning=prompt(1)) for _ in range(2)]
    got = gcfg(hooked, prompt(2), halves, latent)
    assert relative(got, whole) < 1e-4


@pytest.mark.parametrize("pair", [(3.0, -3.0), (3.0, -2.0)], ids=["sum 0", "sum 1"])
def test_cancelling_weights_stay_finite(gcfg, prior, hooked, prompt, latent, pair):
    terms = [GuidanceTerm(w, conditioning=prompt(i)) for i, w in enumerate(pair, start=1)]
    assert torch.isfinite(gcfg(hooked, prompt(0), terms, latent)).all()


def test_cfg_pp_sampler(gcfg, stock, prior, prompt, latent, comfy):
    """The cfg++ samplers set a post-cfg hook in the middle of the run."""
    name = "euler_cfg_pp"
    if name not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip("this ComfyUI has no cfg++ samplers")
    expected = stock(prior, prompt(1), prompt(2), latent, cfg=1.5, sampler=name)
    assert torch.equal(
        gcfg(prior, prompt(2), [GuidanceTerm(1.5, conditioning=prompt(1))], latent, sampler=name), expected
    )
    off = GuidanceTerm(1.5, end_percent=0.4, conditioning=prompt(1))
    assert torch.isfinite(gcfg(prior, prompt(2), [off], latent, sampler=name)).all()
