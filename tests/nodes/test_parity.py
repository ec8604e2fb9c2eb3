"""DESIGN section 1, against the stock nodes on the same models, noise and schedule."""

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import relative

SAMPLERS = ["euler", "dpmpp_2m", "dpmpp_sde", "uni_pc"]
SCHEDULERS = ["normal", "karras", "simple"]
# The same calls combined in another order of float32 operations: a few ulp per step, amplified by the model.
REORDERED = 2e-5


@pytest.fixture
def masked(latent):
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1.0
    return {"samples": image, "noise_mask": mask}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("inpaint", [False, True], ids=["empty", "noise_mask"])
def test_one_term_and_a_pair_are_stock_cfg(gcfg, stock, prior, prompt, latent, masked, sampler, scheduler, inpaint):
    """The term around the negative prompt, and by Eq. 7 as two terms, whose weights sum to 1."""
    image, how = masked if inpaint else latent, {"sampler": sampler, "scheduler": scheduler}
    expected = stock(prior, prompt(1), prompt(2), image, **how)
    assert torch.isfinite(expected).all()
    positive, negative = GuidanceTerm(7.5, conditioning=prompt(1)), GuidanceTerm(-6.5, conditioning=prompt(2))
    assert torch.equal(gcfg(prior, prompt(2), [positive], image, **how), expected)
    assert torch.equal(gcfg(prior, prompt(3), [positive, negative], image, **how), expected)


def test_eq_7_costs_what_stock_cfg_costs(gcfg, stock, prior, prompt, latent, count_forwards):
    calls = count_forwards(prior)
    stock(prior, prompt(1), prompt(2), latent)
    expected = list(calls)
    calls.clear()
    terms = [GuidanceTerm(7.3, conditioning=prompt(1)), GuidanceTerm(1 - 7.3, conditioning=prompt(2))]
    gcfg(prior, prompt(3), terms, latent)
    assert calls == expected


def test_weight_one_is_stock_cfg_one(gcfg, stock, prior, prompt, latent, count_forwards):
    expected = stock(prior, prompt(1), prompt(2), latent, cfg=1.0)
    calls = count_forwards(prior)
    got = gcfg(prior, prompt(2), [GuidanceTerm(1.0, conditioning=prompt(1))], latent)
    assert torch.equal(got, expected)
    assert [batch for _, batch in calls] == [1] * 4, "the unconditional must not be evaluated"


def test_zero_weight_is_not_evaluated(gcfg, prior, concept, prompt, latent, count_forwards):
    calls = count_forwards(prior, concept)
    term = GuidanceTerm(5.0, conditioning=prompt(1))
    off = GuidanceTerm(0.0, model=concept, conditioning=prompt(3))
    with_off = gcfg(prior, prompt(2), [term, off], latent)
    assert {module for module, _ in calls} == {id(prior.model.diffusion_model)}
    assert torch.equal(with_off, gcfg(prior, prompt(2), [term], latent))


def test_interval_is_stock_prompt_scheduling(gcfg, stock, prior, prompt, latent, comfy):
    """A term up to 50 % and another from there on equal ConditioningSetTimestepRange on the two prompts."""
    import sys

    ranged = sys.modules["nodes"].ConditioningSetTimestepRange().set_range
    early, late = ranged(prompt(1), 0.0, 0.5)[0], ranged(prompt(3), 0.5, 1.0)[0]
    expected = stock(prior, early + late, prompt(2), latent, steps=6)
    terms = [
        GuidanceTerm(7.5, end_percent=0.5, conditioning=prompt(1)),
        GuidanceTerm(7.5, start_percent=0.5, conditioning=prompt(3)),
    ]
    got = gcfg(prior, prompt(2), terms, latent, steps=6)
    assert torch.equal(got, expected)
    assert not torch.equal(got, gcfg(prior, prompt(2), [GuidanceTerm(7.5, conditioning=prompt(1))], latent, steps=6))


def test_order_of_terms_does_not_matter(gcfg, prior, concept, prompt, latent):
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(-1.5, conditioning=prompt(3)),
        GuidanceTerm(2.0, model=concept, conditioning=prompt(4)),
    ]
    expected = gcfg(prior, prompt(2), terms, latent)
    for order in ([1, 2, 0], [2, 1, 0], [0, 2, 1]):
        got = gcfg(prior, prompt(2), [terms[i] for i in order], latent)
        assert relative(got, expected) < REORDERED


def test_samples_of_a_batch_do_not_influence_each_other(gcfg, prior, concept, prompt):
    terms = [GuidanceTerm(3.0, conditioning=prompt(1)), GuidanceTerm(2.0, model=concept, conditioning=prompt(4))]
    both = gcfg(prior, prompt(2), terms, {"samples": torch.zeros(2, 4, 8, 8)})
    for index in range(2):
        alone = {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [index]}
        batched = {"samples": torch.zeros(2, 4, 8, 8), "batch_index": [0, 1]}
        assert relative(
            gcfg(prior, prompt(2), terms, alone), gcfg(prior, prompt(2), terms, batched)[index : index + 1]
        ) < (REORDERED)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("denoise", [0.5, 0.0])
def test_img2img(gcfg, stock, prior, prompt, masked, denoise):
    image = {"samples": masked["samples"]}
    expected = stock(prior, prompt(1), prompt(2), image, denoise=denoise)
    got = gcfg(prior, prompt(2), [GuidanceTerm(7.5, conditioning=prompt(1))], image, denoise=denoise)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("window", [(0, 2), (2, 4), (1, 3), (0, 10000), (9, 10), (0, 0)])
@pytest.mark.parametrize("leftover", ["enable", "disable"])
@pytest.mark.parametrize("add_noise", ["enable", "disable"])
def test_advanced_runs_the_same_part_of_the_schedule(prior, prompt, masked, comfy, window, leftover, add_noise):
    import sys

    from comfyui_gcfg.nodes.sampling import GCFGKSamplerAdvanced

    image = {"samples": masked["samples"]}
    common = ("normal",)
    expected = (
        sys.modules["nodes"]
        .KSamplerAdvanced()
        .sample(prior, add_noise, 3, 4, 7.5, "dpmpp_2m", *common, prompt(1), prompt(2), image, *window, leftover)[0][
            "samples"
        ]
    )
    got = GCFGKSamplerAdvanced().sample(
        prior,
        add_noise,
        3,
        4,
        "dpmpp_2m",
        *common,
        prompt(2),
        image,
        *window,
        leftover,
        term_3=(GuidanceTerm(7.5, conditioning=prompt(1)),),
    )[0]["samples"]
    assert torch.equal(got, expected)


def test_guider_in_stock_sampler_custom_advanced(prior, prompt, latent, stock, custom_advanced):
    from comfyui_gcfg.nodes.sampling import GCFGGuider

    guider = GCFGGuider().make(prior, prompt(2), term_1=(GuidanceTerm(7.5, conditioning=prompt(1)),))[0]
    expected = stock(prior, prompt(1), prompt(2), latent)
    for _ in range(2):  # a guider can be run twice
        assert torch.equal(custom_advanced(guider, latent, 4)["samples"], expected)


@pytest.mark.parametrize(("family", "width"), [("sd21", 1024), ("sdxl", 2048)])
def test_other_families(gcfg, stock, load_unet, weights, prompt, latent, family, width):
    model = load_unet(weights(family, 0))
    expected = stock(model, prompt(1, width), prompt(2, width), latent, steps=2)
    got = gcfg(model, prompt(2, width), [GuidanceTerm(7.5, conditioning=prompt(1, width))], latent, steps=2)
    assert torch.isfinite(got).all()
    assert torch.equal(got, expected)
