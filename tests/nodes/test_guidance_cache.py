"""Guidance Cache in a real ComfyUI: what is evaluated, what comes out, and that nothing is left over."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from comfyui_gcfg.gcfg.guidance_cache import CacheRule
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import bent_prior

SAMPLERS = ["euler", "dpmpp_2m", "heun", "dpm_2", "dpmpp_sde", "uni_pc", "euler_ancestral"]
WIDGETS = {
    "mode": "every",
    "every": 2,
    "threshold": 0.4,
    "extrapolation": "linear",
    "start_percent": 0.0,
    "end_percent": 1.0,
    "align": 1.0,
}
FULL = [{"every": 1}, {"mode": "threshold", "threshold": 0.0}]


@pytest.fixture
def cached(comfy):
    """Terms through the node; widgets by name."""
    from comfyui_gcfg.nodes.guidance_cache import GCFGGuidanceCache

    def make(terms, **widgets):
        return GCFGGuidanceCache().make(tuple(terms), **{**WIDGETS, **widgets})[0]

    return make


@pytest.fixture
def terms(exact, concept, prompt):
    """Text on the sampler's own model, and another model."""
    other = exact(concept, "concept", 1.0)
    return [GuidanceTerm(5.0, conditioning=prompt(1), label="text"), GuidanceTerm(1.5, model=other, label="concept")]


@pytest.mark.parametrize("widgets", FULL)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_the_full_run_to_the_last_bit(gcfg, cached, base, terms, prompt, latent, sampler, widgets):
    plain = gcfg(base, prompt(0), terms, latent, steps=5, sampler=sampler)
    got = gcfg(base, prompt(0), cached(terms, **widgets), latent, steps=5, sampler=sampler)
    assert torch.equal(got, plain)
    assert not torch.equal(gcfg(base, prompt(0), cached(terms), latent, steps=5, sampler=sampler), plain)


@pytest.mark.parametrize("widgets", FULL)
def test_one_term_at_every_step_is_the_stock_sampler(gcfg, stock, cached, prior, prompt, latent, widgets):
    """On a real UNet."""
    terms = cached([GuidanceTerm(7.5, conditioning=prompt(1))], **widgets)
    got = gcfg(prior, prompt(0), terms, latent, sampler="dpmpp_2m", scheduler="karras")
    assert torch.equal(got, stock(prior, prompt(1), prompt(0), latent, sampler="dpmpp_2m", scheduler="karras"))


def test_without_the_node_a_term_has_no_rule(terms):
    assert all(term.cache_rule is None for term in terms)


@pytest.mark.parametrize(
    ("sampler", "steps", "prior_calls", "concept_calls"),
    [
        # Batches of the prior (with the base: 2) and calls of the concept: steps 1, 2, 4, 6 are full, 3, 5, 7 the
        # concept's alone.
        ("euler", 7, [2] * 4, 7),
        # Levels 1 22 33 44 55 66 7 7: heun's last step evaluates once. Full: 1, 2, 4, 6.
        ("heun", 7, [2] * (1 + 2 + 2 + 2), 13),
        # Two evaluations a step, at its level and between it and the next; one in the last.
        ("dpm_2", 7, [2] * (2 + 2 + 2 + 2), 13),
        ("dpmpp_sde", 7, [2] * (2 + 2 + 2 + 2), 13),
    ],
)
def test_steps_are_counted_not_evaluations(
    gcfg, cached, base, terms, prompt, latent, calls, sampler, steps, prior_calls, concept_calls
):
    gcfg(base, prompt(0), cached(terms), latent, steps=steps, sampler=sampler)
    assert [batch for name, batch in calls if name == "prior"] == prior_calls
    assert [batch for name, batch in calls if name == "concept"] == [1] * concept_calls


def exact_denoised(x, sigma, offset, prompt):
    """What the `exact` models predict, in float64."""
    return bent_prior(x, sigma, offset + prompt[0][0][:, :1, :1, None].double())


def test_against_a_loop_written_by_hand(cached, base, terms, prompt, latent, comfy):
    """Euler in float64: lines through eps-deltas in log sigma, from the concept's prediction at steps 3 and 5."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    sigmas = torch.tensor([14.0, 7.0, 4.0, 2.0, 0.8, 0.1])
    starts = []

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        starts.append(x.clone())
        for sigma, after in pairwise(sigmas):
            denoised = model(x, sigma.expand(1), **(extra_args or {}))
            x = x + (x - denoised) / sigma * (after - sigma)
        return x

    guider = GCFGGuider(base, prompt(0), cached(terms), "test")
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(3))
    got = guider.sample(noise, latent["samples"], comfy.samplers.KSAMPLER(euler), sigmas, disable_pbar=True, seed=3)

    x, seen = starts[0].double(), {"text": [], "concept": []}

    def line(name, sigma):
        (s1, d1), (s2, d2) = seen[name][-2:]
        return d2 + (d2 - d1) * math.log(sigma / s2) / math.log(s2 / s1)

    for number, (sigma, after) in enumerate(pairwise(sigmas.tolist()), start=1):
        concept = exact_denoised(x, sigma, 1.0, prompt(0))
        if number in (1, 2, 4):
            uncond, text = (exact_denoised(x, sigma, 0.0, prompt(seed)) for seed in (0, 1))
            seen["text"].append((sigma, (text - uncond) / sigma))
            seen["concept"].append((sigma, (concept - uncond) / sigma))
        else:
            uncond = concept - sigma * line("concept", sigma)
            text = uncond + sigma * line("text", sigma)
        denoised = uncond + 5.0 * (text - uncond) + 1.5 * (concept - uncond)
        x = x + (x - denoised) / sigma * (after - sigma)
    expected = base.model.latent_format.process_out(x.float())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_line_is_nearer_to_the_full_run_than_holding(gcfg, cached, base, terms, prompt, latent):
    def run(terms):
        return gcfg(base, prompt(0), terms, latent, steps=20, sampler="euler", scheduler="karras")

    full = run(terms)
    far = {kind: (run(cached(terms, extrapolation=kind)) - full).norm() / full.norm() for kind in ("linear", "hold")}
    assert 0 < far["linear"] < far["hold"] < 0.2


def test_runs_seeds_and_failures_leave_nothing_behind(gcfg, cached, base, exact, prior, terms, prompt, latent):
    """One run after another, of one guider and of several, with another seed, and after one that failed."""

    def run(terms, seed=1):
        return gcfg(base, prompt(0), terms, latent, seed=seed, steps=6)

    rule = cached(terms)
    first = run(rule)
    run(rule, seed=2)
    run(cached(terms, every=5, extrapolation="hold"))
    assert torch.equal(run(rule), first)

    def fail(apply_model, args):
        if float(args["timestep"][0]) < 2.0:
            raise InterruptedError
        return apply_model(args["input"], args["timestep"], **args["c"])

    broken = prior.clone()
    broken.set_model_unet_function_wrapper(fail)
    with pytest.raises(InterruptedError):
        gcfg(broken, prompt(0), rule, latent, steps=6)
    assert torch.equal(run(rule), first)


def test_one_guider_object_begins_anew_in_each_run(cached, base, terms, prompt, latent, comfy, calls):
    """SamplerCustomAdvanced may run a guider again, as a cached node's output is."""
    from comfyui_gcfg.nodes.sampling import GCFGGuider

    guider, _ = GCFGGuider().make(base, prompt(0), term_1=cached(terms))
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "karras", 5)
    results = []
    for seed in (1, 2, 1):
        noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(seed))
        sampler = comfy.samplers.sampler_object("dpmpp_2m")
        results.append(guider.sample(noise, latent["samples"], sampler, sigmas, disable_pbar=True, seed=seed))
        assert "cache" not in vars(guider)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert [name for name, _ in calls].count("prior") == 3 * 3


def test_samples_of_a_batch_do_not_influence_each_other(gcfg, cached, base, terms, prompt):
    """In the mode every; in the mode threshold a batch is one decision, of its most changing sample."""
    batch = {"samples": torch.zeros(3, 4, 8, 8)}
    whole = gcfg(base, prompt(0), cached(terms), batch, steps=6)
    for index in range(3):
        one = {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [index]}
        torch.testing.assert_close(gcfg(base, prompt(0), cached(terms), one, steps=6), whole[index : index + 1])


@pytest.mark.parametrize("widgets", [{}, {"mode": "threshold", "threshold": 0.3}, {"every": 1, "align": 0.5}])
def test_the_cells_of_a_sweep_are_runs_of_their_own(gcfg, cached, base, terms, prompt, latent, widgets):
    """A term of weight 0 is in no cell's cache."""
    from comfyui_gcfg.gcfg.sweep_weights import SweptTerm, cell_terms
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider
    from comfyui_gcfg.nodes.runtime.ksampler import sample_cells

    terms = cached(terms, **widgets)
    cells = cell_terms(terms, [SweptTerm(0, "text", (0.0, 0.4, 5.0)), SweptTerm(1, "concept", (1.5, -1.0, 3.0))])
    guiders = [GCFGGuider(base, prompt(0), cell, "test") for cell in cells]
    how = {"seed": 1, "steps": 6, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    got = sample_cells(guiders, latent, **how)["samples"]
    single = [gcfg(base, prompt(0), cell, latent, steps=6, sampler="dpmpp_2m", scheduler="karras") for cell in cells]
    assert torch.equal(got, torch.cat(single))
    assert len({float(cell.sum()) for cell in single}) == 9


def test_where_the_weights_sum_to_one_a_term_is_the_centre(gcfg, cached, base, prompt, latent, calls):
    """Eq. 7: the negative prompt stands where the unconditional would, and is carried on from the positive."""
    terms = [GuidanceTerm(7.5, conditioning=prompt(1)), GuidanceTerm(-6.5, conditioning=prompt(2))]
    gcfg(base, prompt(0), cached(terms), latent, steps=6)
    assert calls == [("prior", 2), ("prior", 2), ("prior", 1), ("prior", 2), ("prior", 1), ("prior", 2)]


def test_rules_of_their_own(gcfg, cached, base, terms, prompt, latent, calls):
    """Text at every second step, the concept at every third; what is due brings the unconditional with it."""
    text, concept = terms
    rules = [*cached([text]), *cached([concept], every=3)]
    gcfg(base, prompt(0), rules, latent, steps=8)
    # Steps 1 and 2: all. 3: the concept alone. 4: text due. 5: concept due. 6: text. 7: the concept alone. 8: both.
    each = [[("prior", 2), ("concept", 1)]] * 2 + [[("concept", 1)], [("prior", 2)], [("prior", 1), ("concept", 1)]]
    each += [[("prior", 2)], [("concept", 1)], [("prior", 2), ("concept", 1)]]
    assert sorted(calls) == sorted(call for step in each for call in step)


def test_an_interval_of_the_sampling(gcfg, cached, base, terms, prompt, latent, calls):
    """Up to half of the sampling every step; then every second."""
    gcfg(base, prompt(0), cached(terms, start_percent=0.5), latent, steps=8, scheduler="simple")
    sampling = base.get_model_object("model_sampling")
    names = [name for name, _ in calls]
    assert names.count("concept") == 8
    begins = float(sampling.percent_to_sigma(0.5))
    assert 4 < names.count("prior") < 8, begins
    calls.clear()
    gcfg(base, prompt(0), cached(terms, end_percent=0.0), latent, steps=8, scheduler="simple")
    assert [name for name, _ in calls].count("prior") == 8


def test_a_term_that_begins_later_is_evaluated_first(gcfg, cached, base, terms, prompt, latent, calls):
    text, concept = terms
    late = replace(concept, start_percent=0.5)
    result = gcfg(base, prompt(0), cached([text, late]), latent, steps=8, scheduler="simple")
    assert torch.isfinite(result).all()
    names = [name for name, _ in calls]
    assert 0 < names.count("concept") < 6


def test_guidance_hooks_and_masks_see_whole_predictions(gcfg, cached, base, terms, prompt, latent, comfy):
    """What is carried on goes through the same sum: with k = 1 equal to the full run, with k = 2 finite and near."""
    seen = []

    def hook(args):
        seen.append(args["uncond"])
        return args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])

    hooked = base.clone()
    hooked.set_model_sampler_cfg_function(hook, disable_cfg1_optimization=True)
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1.0
    text, concept = terms
    masked = [text, replace(concept, mask=mask)]
    full = gcfg(hooked, prompt(0), masked, latent, steps=8, scheduler="karras")
    assert torch.equal(gcfg(hooked, prompt(0), cached(masked, every=1), latent, steps=8, scheduler="karras"), full)
    half = gcfg(hooked, prompt(0), cached(masked), latent, steps=8, scheduler="karras")
    assert 0 < (half - full).norm() / full.norm() < 0.3
    assert len(seen) == 24
    assert all(torch.isfinite(uncond).all() for uncond in seen)


def test_readings_are_taken_at_every_step(cached, base, terms, prompt, latent, comfy):
    """The chart shows what acted, carried on or evaluated."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider
    from comfyui_gcfg.nodes.runtime.live import Watch

    watch = Watch(wanted=True)
    guider = GCFGGuider(base, prompt(0), cached(terms), "test", watch)
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "karras", 6)
    noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))
    guider.sample(noise, latent["samples"], comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    assert [reading.step for reading in watch.report.readings] == [1, 2, 3, 4, 5, 6]
    assert all(pull > 0 for reading in watch.report.readings for pull in reading.pulls)


def test_the_node_gives_its_rule_to_all_terms_and_changes_nothing_else(cached, terms):
    text, concept = terms
    got = cached(
        [text, concept], mode="threshold", threshold=0.25, extrapolation="hold", start_percent=0.1, end_percent=0.9
    )
    rule = CacheRule(every=None, threshold=0.25, linear=False, start_percent=0.1, end_percent=0.9)
    assert [term.cache_rule for term in got] == [rule, rule]
    for before, after in zip((text, concept), got, strict=True):
        assert replace(after, cache_rule=None).__dict__ == before.__dict__
    assert text.cache_rule is None
