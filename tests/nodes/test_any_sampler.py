"""GCFG Model in ComfyUI's own samplers: the very run of a GCFG KSampler on the same sum, and nothing left behind."""

import inspect

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.nodes.guidance import GCFGGuidanceTerm
from comfyui_gcfg.testkit import checks


def node():
    from comfyui_gcfg.nodes.model import GCFGModel

    return GCFGModel()


@pytest.fixture
def versions(comfy):
    from comfyui_gcfg.nodes.runtime import versions

    return versions


@pytest.fixture(autouse=True)
def new_enough(request, versions):
    if not versions.HAS_HOOKS and request.node.name != "test_the_oldest_comfyui_refuses":
        pytest.skip("this ComfyUI has no wrappers around a run")


def with_terms(model, *terms):
    return node().make(model, term_1=terms)[0]


@pytest.fixture
def cases(prior, concept, prompt):
    """Terms by what they try; each is added to positive, negative and cfg."""
    mask = torch.zeros(1, 64, 64)
    mask[..., 20:] = 1.0
    style = prior.clone()
    style.add_patches({"diffusion_model.input_blocks.0.0.bias": (torch.ones(64),)}, 0.5)
    return {
        "another model": [GuidanceTerm(1.5, model=concept, conditioning=prompt(3))],
        "the sampler's own model": [GuidanceTerm(-2.0, conditioning=prompt(3))],
        "a LoRA's clone": [GuidanceTerm(2.0, model=style, conditioning=prompt(1))],
        "masked, for a while": [GuidanceTerm(2.0, 0.2, 0.8, model=concept, conditioning=prompt(3), mask=mask)],
        "relative": [GuidanceTerm(3.0, model=concept, conditioning=prompt(1), relative_conditioning=prompt(2))],
        "two": [GuidanceTerm(1.5, model=concept), GuidanceTerm(2.0, conditioning=prompt(3))],
        "a pair": [GuidanceTerm(2.0, conditioning=prompt(3)), GuidanceTerm(-1.0, conditioning=prompt(4))],
    }


NAMES = ["another model", "the sampler's own model", "a LoRA's clone", "masked, for a while", "relative", "two"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cfg", [7.5, 1.0])
def test_ksampler_samples_the_sum(gcfg, stock, prior, prompt, latent, cases, name, cfg):
    expected = gcfg(prior, prompt(2), [GuidanceTerm(cfg, conditioning=prompt(1)), *cases[name]], latent)
    before = stock(prior, prompt(1), prompt(2), latent, cfg=cfg)
    assert torch.equal(stock(with_terms(prior, *cases[name]), prompt(1), prompt(2), latent, cfg=cfg), expected)
    assert torch.equal(stock(prior, prompt(1), prompt(2), latent, cfg=cfg), before), "the model itself is as it was"
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde", "uni_pc", "heun"])
def test_every_solver(gcfg, stock, prior, prompt, latent, cases, sampler):
    expected = gcfg(
        prior, prompt(2), [GuidanceTerm(5.0, conditioning=prompt(1)), *cases["two"]], latent, sampler=sampler
    )
    got = stock(with_terms(prior, *cases["two"]), prompt(1), prompt(2), latent, cfg=5.0, sampler=sampler)
    assert torch.equal(got, expected)


def test_image_to_image_under_a_mask(gcfg, stock, prior, prompt, cases):
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1.0
    masked = {"samples": image, "noise_mask": mask}
    terms = [GuidanceTerm(5.0, conditioning=prompt(1)), *cases["another model"]]
    expected = gcfg(prior, prompt(2), terms, masked, denoise=0.6)
    got = stock(with_terms(prior, *cases["another model"]), prompt(1), prompt(2), masked, cfg=5.0, denoise=0.6)
    assert torch.equal(got, expected)


def test_a_mask_for_each_sample(gcfg, stock, prior, prompt, cases):
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(6))
    masked = {"samples": image, "noise_mask": mask}
    terms = [GuidanceTerm(5.0, conditioning=prompt(1)), *cases["another model"]]
    expected = gcfg(prior, prompt(2), terms, masked)
    got = stock(with_terms(prior, *cases["another model"]), prompt(1), prompt(2), masked, cfg=5.0)
    assert torch.equal(got, expected)


def test_two_samplers_in_a_row_each_with_its_own_patched_model(comfy, prior, concept, prompt, latent):
    """As with Wan 2.2's two models, one for the high noise levels and one for the low ones."""
    import sys

    from comfyui_gcfg.nodes.sampling import GCFGKSamplerAdvanced

    stock, ours = sys.modules["nodes"].KSamplerAdvanced(), GCFGKSamplerAdvanced()
    ways = (1, 4, "euler", "normal")
    stages = [
        (prior, GuidanceTerm(1.5, model=concept), ("enable", 0, 2, "enable")),
        (concept, GuidanceTerm(-2.0, model=prior, conditioning=prompt(3)), ("disable", 2, 10000, "disable")),
    ]
    got = expected = latent
    for model, term, (noise, start, end, leftover) in stages:
        seed, steps, sampler, scheduler = ways
        cfg, positive, negative = 4.0, prompt(1), prompt(2)
        patched = with_terms(model, term)
        got = stock.sample(
            patched, noise, seed, steps, cfg, sampler, scheduler, positive, negative, got, start, end, leftover
        )[0]
        terms = (GuidanceTerm(cfg, conditioning=positive), term)
        expected = ours.sample(
            model, noise, seed, steps, sampler, scheduler, negative, expected, start, end, leftover, term_1=terms
        )[0]
    assert torch.equal(got["samples"], expected["samples"])
    plain = stock.sample(prior, "enable", *ways[:2], 4.0, *ways[2:], prompt(1), prompt(2), latent, 0, 2, "enable")[0]
    assert not torch.equal(plain["samples"], got["samples"])


@pytest.fixture
def custom(custom_advanced, latent):
    """SamplerCustomAdvanced's run of any guider."""
    return lambda guider: custom_advanced(guider, latent, 4)["samples"]


def test_the_basic_guiders_one_prompt_is_what_terms_are_added_to(extra, custom, prior, prompt, cases):
    """As with Flux, whose guidance is distilled: a relative term is its negative prompt."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    basic = extra("nodes_custom_sampler").Guider_Basic(with_terms(prior, *cases["relative"]))
    basic.set_conds(prompt(1))
    assert torch.equal(custom(basic), custom(GCFGGuider(prior, prompt(1), cases["relative"], "GCFG Guider")))


@pytest.mark.parametrize("name", [*NAMES, "a pair"])
def test_guiders_of_other_packs_run_as_they_are(comfy, custom, prior, prompt, cases, name):
    """As RES4LYF's: a guider that chooses its prompts and its cfg by itself, and then does as stock."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = self.conds["xt_negative"], self.conds["xt_positive"]
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, *conds, 5.0, model_options=model_options, seed=seed
            )

    def other(model):
        guider = Other(model)
        guider.inner_set_conds({"xt_positive": prompt(1), "xt_negative": prompt(2)})
        return guider

    before = custom(other(prior))
    got = custom(other(with_terms(prior, *cases[name])))
    own = GuidanceTerm(5.0, conditioning=prompt(1))
    expected = custom(GCFGGuider(prior, prompt(2), [own, *cases[name]], "GCFG Guider"))
    assert checks.relative(got, expected) < 2e-5
    assert torch.equal(custom(other(prior)), before)


@pytest.mark.parametrize("place", ["conditioning", "relative_conditioning"])
def test_weight_hooks_of_a_term_act_under_another_guider(comfy, custom, other, weights, prior, prompt, place):
    """The guider's own patcher is the one that its module evaluates with, and knows nothing of a term's hooks."""
    import comfy.hooks
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider
    from comfyui_gcfg.testkit.models import lora_state_dict

    prompts = {"conditioning": prompt(3), "relative_conditioning": prompt(4)}
    hooks = comfy.hooks.create_hook_lora(lora_state_dict(weights(), 1), 1.0, 0.0)
    prompts[place] = comfy.hooks.set_hooks_for_conditioning(prompts[place], hooks)
    before = custom(other(prior))
    term = GuidanceTerm(2.0, **prompts)
    own = GuidanceTerm(5.0, conditioning=prompt(1))
    expected = custom(GCFGGuider(prior, prompt(2), [own, term], "GCFG Guider"))
    assert checks.relative(custom(other(with_terms(prior, term))), expected) < 2e-5
    assert torch.equal(custom(other(prior)), before)


def test_another_guider_at_cfg_one_still_tells_its_negative(extra, custom, prior, prompt, cases):
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    dual = extra("nodes_custom_sampler").Guider_DualCFG(with_terms(prior, *cases["another model"]))
    dual.set_conds(prompt(1), prompt(2), prompt(3))
    dual.set_cfg(4.0, 1.0)
    terms = [
        GuidanceTerm(1.0, conditioning=prompt(2)),
        GuidanceTerm(4.0, conditioning=prompt(1), relative_conditioning=prompt(2)),
    ]
    expected = custom(GCFGGuider(prior, prompt(3), [*terms, *cases["another model"]], "GCFG Guider"))
    assert checks.relative(custom(dual), expected) < 2e-5


@pytest.mark.parametrize("inner", ["stock", "other"])
def test_a_guider_that_samples_its_model_twice(comfy, custom, other, prior, prompt, cases, inner):
    """Once before its own run, as one that makes a preview; the terms are in both."""
    seen = []

    def make(model, twice):
        guider = other(model)
        run = guider.outer_sample

        def outer_sample(noise, latent_image, *args, **kwargs):
            first = comfy.samplers.CFGGuider(guider.model_patcher) if inner == "stock" else other(guider.model_patcher)
            first.set_conds(prompt(1), prompt(2))
            first.set_cfg(5.0)
            euler = comfy.samplers.sampler_object("euler")
            seen.append(first.sample(noise, latent_image, euler, torch.tensor([3.0, 0.0]), disable_pbar=True))
            return run(noise, latent_image, *args, **kwargs)

        guider.outer_sample = outer_sample if twice else run
        return guider

    model = with_terms(prior, *cases["two"])
    expected = custom(make(model, twice=False))
    assert torch.equal(custom(make(model, twice=True)), expected)
    custom(make(prior, twice=True))
    assert not torch.equal(*seen)
    assert model.additional_models == prior.additional_models
    assert torch.equal(custom(other(model)), expected)


@pytest.mark.parametrize("guider", ["stock", "other"])
def test_a_node_behind_that_drops_callbacks(stock, custom, other, prior, prompt, latent, cases, guider):
    model = with_terms(prior, *cases["two"])
    dropped = model.clone()
    dropped.callbacks.clear()
    run = custom if guider == "other" else (lambda g: stock(g.model_patcher, prompt(1), prompt(2), latent, cfg=5.0))
    assert torch.equal(run(other(dropped)), run(other(model)))


@pytest.mark.parametrize("levels", [1, 2])
def test_a_run_of_no_step_under_another_guider(comfy, other, prior, cases, levels):
    """It is as without the terms."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    got = []
    for model in (prior, with_terms(prior, *cases["two"])):
        euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([3.0, 0.0])[:levels]
        got.append(other(model).sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True))
    assert torch.equal(*got) == (levels == 1)


def test_another_guider_with_guidance_cache_evaluates_less(custom, other, prior, concept, prompt, count_forwards):
    from comfyui_gcfg.gcfg.guidance_cache import CacheRule

    calls = count_forwards(concept)
    term = GuidanceTerm(1.5, model=concept, conditioning=prompt(3), cache_rule=CacheRule(every=2, linear=False))
    assert custom(other(with_terms(prior, term))).isfinite().all()
    assert len(calls) == 2  # at steps 1 and 3 of 4


def test_terms_of_two_nodes_are_summed(gcfg, stock, prior, prompt, latent, cases):
    first, second = cases["two"]
    expected = gcfg(prior, prompt(2), [GuidanceTerm(5.0, conditioning=prompt(1)), first, second], latent)
    twice = with_terms(with_terms(prior, first), second)
    assert torch.equal(stock(twice, prompt(1), prompt(2), latent, cfg=5.0), expected)


def test_nodes_behind_and_in_front_act_as_on_the_ksampler(gcfg, stock, prior, prompt, latent, cases):
    """A guidance hook on the model acts on the whole sum, wherever its node stands."""

    def halved(args):
        return args["denoised"] * 0.5

    def put(model):
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(halved)
        return clone

    terms = cases["another model"]
    expected = gcfg(put(prior), prompt(2), [GuidanceTerm(5.0, conditioning=prompt(1)), *terms], latent)
    for model in (put(with_terms(prior, *terms)), with_terms(put(prior), *terms)):
        assert torch.equal(stock(model, prompt(1), prompt(2), latent, cfg=5.0), expected)


@pytest.fixture
def other(comfy, prompt):
    """A guider of another pack's, which does as stock."""

    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs)

    def make(model):
        guider = Other(model)
        guider.set_conds(prompt(1), prompt(2))
        guider.set_cfg(5.0)
        return guider

    return make


@pytest.mark.parametrize("name", ["another model", "a pair's other half"])
@pytest.mark.parametrize("in_front", [True, False])
def test_cfg_override_sets_the_samplers_cfg_and_no_terms_weight(
    extra, caplog, gcfg, stock, prior, prompt, latent, cases, name, in_front
):
    node = getattr(extra("nodes_custom_sampler"), "CFGOverride", None)
    if node is None:
        pytest.skip("this ComfyUI has no CFG Override")
    (term,) = cases.get(name, [GuidanceTerm(-4.0, conditioning=prompt(3))])  # at cfg 5 the two would be stock guidance

    def override(model):
        return node.execute(model, 2.0, 0.0, 1.0).result[0]

    model = with_terms(override(prior), term) if in_front else override(with_terms(prior, term))
    got = stock(model, prompt(1), prompt(2), latent, cfg=5.0)
    expected = gcfg(prior, prompt(2), [GuidanceTerm(2.0, conditioning=prompt(1)), term], latent)
    assert torch.equal(got, expected)
    assert "CFG Override" not in caplog.text


@pytest.mark.parametrize("kind", ["instead", "after"])
@pytest.mark.parametrize("name", ["idle", "another model", "the sampler's own model", "of weight 1"])
def test_hooks_see_the_positive_at_a_cfg_of_zero(stock, prior, prompt, latent, cases, kind, name):
    """As in stock: a hook may have a scale of its own."""
    hooked = prior.clone()
    if kind == "instead":
        hooked.set_model_sampler_cfg_function(lambda args: args["uncond"] + 3.0 * (args["cond"] - args["uncond"]))
    else:
        hooked.set_model_sampler_post_cfg_function(
            lambda args: args["denoised"] + 3.0 * (args["cond_denoised"] - args["uncond_denoised"])
        )
    one = {"idle": GuidanceTerm(0.0, conditioning=prompt(3)), "of weight 1": GuidanceTerm(1.0, conditioning=prompt(3))}
    model = with_terms(hooked, *cases.get(name, [one.get(name)]))
    got = stock(model, prompt(1), prompt(2), latent, cfg=0.0)
    if name == "idle":
        assert checks.relative(got, stock(hooked, prompt(1), prompt(2), latent, cfg=0.0)) < 1e-5
    assert checks.relative(got, stock(model, prompt(1), prompt(2), latent, cfg=1e-6)) < 1e-3


def test_nothing_looks_at_the_positive_at_a_cfg_of_zero_but_hooks(stock, prior, prompt, latent):
    from comfyui_gcfg.nodes.relation import GCFGGuidanceRelation

    hooked = prior.clone()
    hooked.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    ((limited,),) = GCFGGuidanceRelation().make((GuidanceTerm(2.0, conditioning=prompt(3)),), "limit", "positive", 0.5)
    got, plain = (stock(with_terms(m, limited), prompt(1), prompt(2), latent, cfg=0.0) for m in (hooked, prior))
    assert checks.relative(got, plain) < 1e-5


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("override", [1.0, 3.0])
def test_cfg_override_sets_no_terms_weight_after_a_basic_guider(extra, caplog, custom, prior, prompt, count, override):
    nodes = extra("nodes_custom_sampler")
    if not hasattr(nodes, "CFGOverride"):
        pytest.skip("this ComfyUI has no CFG Override")

    def run(model):
        guider = nodes.Guider_Basic(with_terms(model, *terms))
        guider.set_conds(prompt(1))
        return custom(guider)

    terms = [GuidanceTerm(4.0, conditioning=prompt(3)), GuidanceTerm(-3.0, conditioning=prompt(2))][:count]
    assert torch.equal(run(nodes.CFGOverride.execute(prior, override, 0.0, 1.0).result[0]), run(prior))
    assert "CFG Override" not in caplog.text


@pytest.fixture
def windows(extra):
    """Put core's context windows on a model: of 4 rows, 2 of them shared."""
    nodes = extra("nodes_context_windows")
    node = getattr(nodes, "ContextWindowsManualNode", None)
    if node is None:
        pytest.skip("this ComfyUI has no context windows")

    def put(model, freenoise=False):
        inputs = dict(context_length=4, context_overlap=2, context_schedule="standard_static", context_stride=1)
        if "freenoise" in inspect.signature(node.execute).parameters:
            inputs["freenoise"] = freenoise
        elif freenoise:
            pytest.skip("this ComfyUI has no FreeNoise")
        return node.execute(model, **inputs, closed_loop=False, fuse_method="pyramid", dim=2).result[0]

    return put


@pytest.mark.parametrize("freenoise", [False, True])
@pytest.mark.parametrize("on", ["in front", "behind", "the term's model", "both models", "the term and the sampler"])
def test_context_windows(gcfg, stock, prior, concept, prompt, latent, windows, on, freenoise):
    """Each model has its own, and the noise is that of the sampler's model."""

    def put(model):
        return windows(model, freenoise)

    base = put(prior) if on in ("in front", "both models", "the term and the sampler") else prior
    model = {"the term's model": put(concept), "both models": put(concept), "the term and the sampler": base}.get(on)
    idle, term = (GuidanceTerm(weight, model=model, conditioning=prompt(3)) for weight in (0.0, 1.5))

    def run(term):
        patched = put(with_terms(prior, term)) if on == "behind" else with_terms(base, term)
        return stock(patched, prompt(1), prompt(2), latent, cfg=5.0)

    sampled = put(prior) if on == "behind" else base
    plain = stock(sampled, prompt(1), prompt(2), latent, cfg=5.0)
    assert torch.equal(run(idle), plain)
    got = run(term)
    expected = gcfg(sampled, prompt(2), [GuidanceTerm(5.0, conditioning=prompt(1)), term], latent)
    if on == "the term and the sampler":  # older clones have windows of their own, and so calls of their own
        assert checks.relative(got, expected) < 2e-6
    else:
        assert torch.equal(got, expected)
    whole = GuidanceTerm(1.5, model=model and (prior if model is base else concept), conditioning=prompt(3))
    assert checks.relative(stock(with_terms(prior, whole), prompt(1), prompt(2), latent, cfg=5.0), got) > 1e-2


def test_context_windows_of_a_terms_model_are_its_own(stock, prior, concept, prompt, latent, windows, caplog):
    """By hand, in one step: the prediction of the windowed model, and the noise of the sampler's."""

    def predicted(model, cond):
        return stock(model, cond, cond, latent, cfg=1.0, steps=1)

    def got(freenoise):
        term = GuidanceTerm(2.0, model=windows(concept, freenoise), conditioning=prompt(3))
        return stock(with_terms(prior, term), prompt(1), prompt(2), latent, cfg=4.0, steps=1)

    positive, negative = predicted(prior, prompt(1)), predicted(prior, prompt(2))
    pulled = predicted(windows(concept), prompt(3))
    expected = negative + 4.0 * (positive - negative) + 2.0 * (pulled - negative)
    assert checks.relative(got(False), expected) < 1e-5
    assert checks.relative(pulled, predicted(concept, prompt(3))) > 1e-2
    assert "changes noise of the sampling" not in caplog.text
    assert torch.equal(got(True), got(False))
    assert "changes noise of the sampling" in caplog.text


@pytest.mark.parametrize("guider", ["stock", "other"])
def test_freenoise_on_both_models_is_that_of_the_sampler(
    stock, custom, other, prior, prompt, latent, windows, caplog, guider
):
    base = windows(prior, True)
    lora = base.clone()
    lora.add_patches({"diffusion_model.input_blocks.0.0.bias": (torch.ones(64),)}, 0.5)
    model = with_terms(base, GuidanceTerm(1.5, model=lora, conditioning=prompt(3)))
    if guider == "stock":
        stock(model, prompt(1), prompt(2), latent)
    else:
        custom(other(model))
    assert "of the sampling" not in caplog.text


def test_a_latent_with_nan_is_no_change_by_a_wrapper(stock, prior, concept, prompt, caplog):
    around = concept.clone()
    around.add_wrapper_with_key("outer_sample", "other", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    image = torch.ones(1, 4, 8, 8)
    image[0, 0, 0, 0] = torch.nan
    term = GuidanceTerm(1.5, model=around, conditioning=prompt(3))
    stock(with_terms(prior, term), prompt(1), prompt(2), {"samples": image}, denoise=0.5)
    assert "latent_image holds NaN" in caplog.text
    assert "of the sampling" not in caplog.text


@pytest.mark.parametrize(("cfg", "override"), [(0.0, 2.0), (0.0, 1.0), (5.0, 0.0), (1.0, 0.0)])
def test_cfg_override_to_or_from_zero(extra, gcfg, stock, prior, prompt, latent, cases, cfg, override):
    """At 0 the positive has no part in the sum and is not evaluated; it is where an override brings it back."""
    node = getattr(extra("nodes_custom_sampler"), "CFGOverride", None)
    if node is None:
        pytest.skip("this ComfyUI has no CFG Override")
    overridden = node.execute(prior, override, 0.0, 1.0).result[0]
    nothing = with_terms(overridden, GuidanceTerm(0.0, conditioning=prompt(3)))
    plain = stock(overridden, prompt(1), prompt(2), latent, cfg=cfg)
    assert checks.relative(stock(nothing, prompt(1), prompt(2), latent, cfg=cfg), plain) < 2e-6  # another batch
    (term,) = cases["another model"]
    got = stock(with_terms(overridden, term), prompt(1), prompt(2), latent, cfg=cfg)
    expected = gcfg(prior, prompt(2), [GuidanceTerm(override, conditioning=prompt(1)), term], latent)
    assert torch.equal(got, expected)


def test_cfg_override_of_zero_for_a_part_of_the_sampling(extra, gcfg, stock, prior, prompt, latent, cases):
    node = getattr(extra("nodes_custom_sampler"), "CFGOverride", None)
    if node is None:
        pytest.skip("this ComfyUI has no CFG Override")
    (term,) = cases["another model"]
    model = with_terms(node.execute(prior, 2.0, 0.0, 0.5).result[0], term)
    early = GuidanceTerm(2.0, 0.0, 0.5, conditioning=prompt(1))
    got = stock(model, prompt(1), prompt(2), latent, cfg=0.0)
    assert checks.relative(got, gcfg(prior, prompt(2), [early, term], latent)) < 2e-6
    assert checks.relative(got, gcfg(prior, prompt(2), [term], latent)) > 1e-2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("guider", ["stock", "other"])
def test_wrappers_of_other_packs_act_once(stock, custom, other, prior, prompt, latent, cases, first, guider):
    from comfy.patcher_extension import WrappersMP

    seen = []

    def around(kind):
        def wrapper(executor, *args, **kwargs):
            seen.append(kind)
            return executor(*args, **kwargs)

        return wrapper

    def put(model):
        clone = model.clone()
        for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE):
            clone.add_wrapper_with_key(kind, "other", around(kind))
        return clone

    terms = cases["another model"]
    model = with_terms(put(prior), *terms) if first else put(with_terms(prior, *terms))
    if guider == "stock":
        stock(model, prompt(1), prompt(2), latent)
    else:
        custom(other(model))
    assert seen == [WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE]


def test_an_interrupt_leaves_all_models_clean(comfy, stock, prior, concept, prompt, latent, cases):
    before = [stock(model, prompt(1), prompt(2), latent) for model in (prior, concept)]

    def stop(step, denoised, x, total):
        raise comfy.model_management.InterruptProcessingException

    model = with_terms(prior, *cases["two"])
    sampler = comfy.samplers.KSampler(model, 4, model.load_device, "euler", "normal", 1.0, model.model_options)
    noise = torch.randn(1, 4, 8, 8)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampler.sample(noise, prompt(1), prompt(2), cfg=5.0, latent_image=latent["samples"], callback=stop)
    after = [stock(model, prompt(1), prompt(2), latent) for model in (prior, concept)]
    assert all(map(torch.equal, before, after))
    assert prior.model.current_patcher is None or prior.model.current_patcher.model is prior.model


def test_all_models_are_loaded_with_one_request(monkeypatch, comfy, stock, prior, concept, prompt, latent, cases):
    requests, load = [], comfy.model_management.load_models_gpu

    def counted(models, *args, **kwargs):
        requests.append({id(model.model) for model in models})
        return load(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", counted)
    stock(with_terms(prior, *cases["another model"]), prompt(1), prompt(2), latent)
    assert requests[-1] == {id(prior.model), id(concept.model)}
    assert [both for both in requests if id(concept.model) in both] == [requests[-1]]


def test_a_term_on_the_samplers_model_itself_shares_its_call(stock, prior, prompt, latent, count_forwards):
    calls = count_forwards(prior)
    model = with_terms(prior, GuidanceTerm(2.0, model=prior, conditioning=prompt(3)))
    stock(model, prompt(1), prompt(2), latent, steps=1)
    assert [batch for _, batch in calls] == [3]


def test_the_report_is_of_the_last_run(stock, prior, prompt, latent, cases):
    reader = {"inputs": {"report": ["7", 1]}}
    model, report = node().make(prior, unique_id="7", prompt={"8": reader}, term_1=tuple(cases["two"]))
    stock(model, prompt(1), prompt(2), latent, steps=3)
    assert report.labels == ("positive", "1", "2")
    assert [reading.step for reading in report.readings] == [1, 2, 3]


@pytest.mark.parametrize("guider", ["stock", "other"])
def test_the_reports_of_two_nodes_in_a_row_show_the_terms_of_both(
    monkeypatch, stock, custom, other, prior, prompt, latent, cases, guider
):
    from comfyui_gcfg.nodes.runtime import live

    class Editor:
        client_id = "editor"
        sent = []

        def send_sync(self, event, message, client):
            self.sent.append((message["node"], message["first"], len(message["readings"]), message["labels"]))

    def run(model):
        if guider == "other":
            return custom(other(model))
        return stock(model, prompt(1), prompt(2), latent, steps=4)

    first, second = cases["two"]
    reader = {"7": {"inputs": {"report": ["6", 1]}}}
    patched, one = node().make(prior, unique_id="5", term_1=(first,))  # nobody looks at this one
    patched, two = node().make(patched, unique_id="6", prompt=reader, term_1=(second,))
    both, three = node().make(patched, term_1=(GuidanceTerm(1.0, conditioning=prompt(4)),))
    labels = ("1", "2", "3") if guider == "other" else ("positive", "1", "2", "3")
    run(both)
    assert (one.labels, two.labels) == ((), labels)
    assert [reading.step for reading in two.readings] == [1, 2, 3, 4]
    assert all(all(reading.weights) for reading in two.readings)
    monkeypatch.setattr(live, "prompt_server", Editor)
    run(both)
    assert one.labels == labels
    for name in "56":
        told = [(at, count) for who, at, count, said in Editor.sent if who == name and said == list(labels)]
        assert sum(count for _, count in told) == 4
        assert [at for at, _ in told] == [sum(count for _, count in told[:place]) for place in range(len(told))]
    run(patched)
    assert (two.labels, three.labels) == (labels[:-1], labels)
    run(both)  # by a second sampler, before the report of the first one's run is drawn
    assert (one.labels, two.labels, three.labels) == (labels, labels[:-1], labels)


def test_terms_of_three_nodes_are_what_the_equation_says(comfy, exact, concept, prior, prompt):
    """By hand, in float64: D_neg + cfg (D_pos - D_neg) + sum_i w_i (D_i - R_i)."""
    offsets = {"sampler": 0.0, "concept": 0.7}
    models = {"sampler": exact(prior, "sampler", 0.0), "concept": exact(concept, "concept", 0.7)}
    prompts, sigma = [prompt(number) for number in range(4)], 3.0
    model = models["sampler"]
    for term in (
        GuidanceTerm(1.5, model=models["concept"], conditioning=prompts[2]),
        GuidanceTerm(-0.75, conditioning=prompts[3]),
        GuidanceTerm(2.0, model=models["concept"], conditioning=prompts[3], relative_conditioning=prompts[2]),
    ):
        model = with_terms(model, term)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts[1], prompts[0])
    guider.set_cfg(4.0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    euler = comfy.samplers.sampler_object("euler")
    out = guider.sample(noise, torch.zeros_like(noise), euler, torch.tensor([sigma, 0.0]), disable_pbar=True)
    got, x = prior.get_model_object("latent_format").process_in(out).double(), noise.double() * sigma

    def predicted(name, number):
        variance = 0.09 + sigma**2
        centre = torch.tanh(x / variance) + offsets[name] + prompts[number][0][0].double()[:, :1, :1, None]
        return (centre * sigma**2 + x * 0.09) / variance

    base = predicted("sampler", 0)
    expected = base + 4.0 * (predicted("sampler", 1) - base) + 1.5 * (predicted("concept", 2) - base)
    expected += -0.75 * (predicted("sampler", 3) - base) + 2.0 * (predicted("concept", 3) - predicted("concept", 2))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("guider", ["stock", "other"])
def test_terms_are_numbered_as_their_sockets(stock, custom, other, prior, concept, prompt, latent, guider):
    """Whatever the sampler's guider has before them: a relation finds them, and messages name them."""
    from comfyui_gcfg.nodes.relation import GCFGGuidanceRelation

    terms = (GuidanceTerm(2.0, conditioning=prompt(3)), GuidanceTerm(-1.0, model=concept))
    ((limited,),) = GCFGGuidanceRelation().make(terms[1:], "limit", "1", 0.5)
    run = custom if guider == "other" else (lambda g: stock(g.model_patcher, prompt(1), prompt(2), latent, cfg=5.0))
    assert not torch.equal(run(other(with_terms(prior, terms[0], limited))), run(other(with_terms(prior, *terms))))


class TestBadInput:
    def test_no_term(self, prior):
        with pytest.raises(GuidanceError, match=r"^GCFG Model: no guidance term is connected, expected at least one"):
            node().make(prior)

    def test_terms_would_count_twice(self, gcfg, prior, prompt, latent, cases):
        model = with_terms(prior, *cases["two"])
        with pytest.raises(
            GuidanceError, match=r"GCFG (KSampler|Guider): model comes from a GCFG Model node, whose terms would"
        ):
            gcfg(model, prompt(2), cases["two"], latent)

    @pytest.mark.parametrize("place", ["model", "relative_model"])
    def test_on_the_model_of_a_term(self, stock, prior, prompt, latent, cases, place):
        model = with_terms(prior, *cases["two"])
        ((term,),) = GCFGGuidanceTerm().make(2.0, 0.0, 1.0, conditioning=prompt(3), label="x", **{place: model})
        with pytest.raises(GuidanceError, match=rf"^Guidance Term 'x': {place} comes from a GCFG Model node"):
            stock(with_terms(prior, term), prompt(1), prompt(2), latent)

    def test_a_guider_whose_sum_starts_elsewhere(self, extra, custom, prior, prompt, cases):
        """Nested, the Dual CFG Guider combines around its middle prompt first, and again around that result."""
        dual = extra("nodes_custom_sampler").Guider_DualCFG(with_terms(prior, *cases["two"]))
        if "nested" not in inspect.signature(dual.set_cfg).parameters:
            pytest.skip("this ComfyUI's Dual CFG Guider has no style")
        dual.set_conds(prompt(1), prompt(2), prompt(3))
        dual.set_cfg(5.0, 2.0, True)
        with pytest.raises(
            GuidanceError, match=r"^GCFG Model: the sampler's guider is Guider_DualCFG, whose sum does not"
        ):
            custom(dual)
        assert prior.get_additional_models() == []

    @pytest.mark.parametrize("lost", [1, 3])
    def test_a_guider_that_does_not_tell_its_predictions(self, comfy, custom, prior, prompt, cases, lost):
        """It is refused at the step where it does not, and no run is lost by it."""
        if not hasattr(comfy.samplers.CFGGuider, "outer_predict_noise"):
            pytest.skip("this ComfyUI has no wrappers around a prediction")
        steps = []

        class Silent(comfy.samplers.CFGGuider):
            def predict_noise(self, x, *args, **kwargs):
                steps.append(x)
                return x * 0.5 if len(steps) >= lost else super().predict_noise(x, *args, **kwargs)

        def silent(*terms):
            steps.clear()
            guider = Silent(with_terms(prior, *terms))
            guider.set_conds(prompt(1), prompt(2))
            return guider

        with pytest.raises(GuidanceError, match=r"^GCFG Model: the sampler's guider is Silent, whose sum does not"):
            custom(silent(*cases["two"]))
        assert len(steps) == lost
        assert prior.get_additional_models() == []
        if lost > 1:
            # No term acts where it does not tell.
            custom(silent(GuidanceTerm(2.0, 0.0, 0.25, conditioning=prompt(3))))
            custom(silent(GuidanceTerm(2.0, conditioning=prompt(3, end_percent=0.25))))

    @pytest.mark.parametrize("on", ["model", "model_negative", "both"])
    def test_a_guider_of_two_models(self, extra, custom, prior, concept, prompt, cases, on):
        """Dual Model CFG Guider samples the one, and evaluates its negative prompt on the other."""
        dual = getattr(extra("nodes_custom_sampler"), "Guider_DualModel", None)
        if dual is None:
            pytest.skip("this ComfyUI has no Dual Model CFG Guider")

        def run(model, negative, cfg=4.0):
            guider = dual(model, negative)
            guider.set_conds(prompt(1), prompt(2))
            guider.set_cfg(cfg)
            return custom(guider)

        before = run(prior, concept)
        model = prior if on == "model_negative" else with_terms(prior, *cases["two"])
        negative = concept if on == "model" else with_terms(concept, GuidanceTerm(2.0, conditioning=prompt(3)))
        said = "the sampler's guider is Guider_DualModel, whose sum does not start from a negative prediction that"
        if on != "model":
            said = "its model is evaluated beside the one that is sampled, as model_negative of a Dual Model CFG Guider"
        with pytest.raises(GuidanceError, match=rf"^GCFG Model: {said}"):
            run(model, negative)
        assert torch.equal(run(prior, concept), before)
        if on == "model_negative":  # which it does not evaluate at cfg 1
            assert torch.equal(run(prior, negative, 1.0), run(prior, concept, 1.0))

    def test_terms_of_another_family(self, load_unet, weights, stock, prior, prompt, latent):
        wrong = GuidanceTerm(2.0, model=load_unet(weights("sdxl", 0)), conditioning=prompt(1, 2048), label="xl")
        with pytest.raises(GuidanceError, match=r"^Guidance Term 'xl': latent format is SDXL"):
            stock(with_terms(prior, wrong), prompt(1), prompt(2), latent)

    @pytest.mark.parametrize("basic", [False, True])
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ("width", "GCFG Model: the sampler's {prompt} is 2048 wide, expected 768 for this model"),
            ("range", "GCFG Model: the sampler's {prompt} is limited to a part of the sampling"),
            ("family", "Guidance Term '1': latent format is SDXL, expected SD15 like the sampler's model's"),
            ("nothing", "Guidance Term '1': neither model nor conditioning is connected, expected at least one, "
             "because without them the term predicts the sampler's {prompt} itself and changes nothing"),
            ("latent", "GCFG Model: latent_image has 16 channels, expected 4 as the sampler's model works with"),
        ],
    )  # fmt: skip
    def test_messages_call_the_base_what_it_is_in_the_sampler(
        self, extra, load_unet, weights, custom_advanced, stock, prior, prompt, latent, wrong, message, basic
    ):
        base = {"width": prompt(2, 2048), "range": prompt(2, start_percent=0.9)}.get(wrong, prompt(2))
        term = GuidanceTerm(2.0, conditioning=prompt(3))
        if wrong == "family":
            term = GuidanceTerm(2.0, model=load_unet(weights("sdxl", 0)), conditioning=prompt(1, 2048))
        elif wrong == "nothing":
            term = GuidanceTerm(2.0)
        latent = {"samples": torch.ones(1, 16, 8, 8)} if wrong == "latent" else latent
        model = with_terms(prior, term)
        with pytest.raises(GuidanceError) as error:  # noqa: PT012 - one run, in one of two ways
            if basic:
                guider = extra("nodes_custom_sampler").Guider_Basic(model)
                guider.set_conds(base)
                custom_advanced(guider, latent, 4)
            else:
                stock(model, prompt(1), base, latent)
        assert str(error.value).startswith(message.format(prompt="prompt" if basic else "negative prompt"))
        assert "unconditional" not in str(error.value)

    @pytest.mark.parametrize("guider", ["stock", "other"])
    @pytest.mark.parametrize("known", [True, False])
    def test_the_samplers_positive_is_called_so(
        self, monkeypatch, comfy, custom, other, prior, prompt, cases, guider, known
    ):
        """Whether its width is known before it is sampled or not."""
        if not known:
            monkeypatch.delitem(prior.model.model_config.unet_config, "context_dim")
        sampler = (other if guider == "other" else lambda model: comfy.samplers.CFGGuider(model))(
            with_terms(prior, *cases["two"])
        )
        sampler.set_conds(prompt(1, 2048), prompt(2))
        with pytest.raises(
            GuidanceError, match=r"^GCFG Model: the sampler's positive prompt is 2048 wide, expected 768 for this model"
        ):
            custom(sampler)

    def test_the_samplers_cfg_may_be_beyond_a_terms_weight(self, stock, prior, prompt, latent):
        idle = with_terms(prior, GuidanceTerm(0.0, conditioning=prompt(3)))
        plain = stock(prior, prompt(1), prompt(2), latent, cfg=150.0)
        assert torch.equal(stock(idle, prompt(1), prompt(2), latent, cfg=150.0), plain)

    def test_an_old_comfyui(self, monkeypatch, versions, prior, cases):
        monkeypatch.setattr(versions, "HAS_HOOKS", False)
        with pytest.raises(GuidanceError, match=r"^GCFG Model: this ComfyUI is too old, expected one from 0\.3\.8 on"):
            with_terms(prior, *cases["two"])


def test_the_oldest_comfyui_refuses(versions, prior, prompt):
    if versions.HAS_HOOKS:
        pytest.skip("this ComfyUI has wrappers")
    with pytest.raises(GuidanceError, match=r"^GCFG Model: this ComfyUI is too old"):
        with_terms(prior, GuidanceTerm(1.0, conditioning=prompt(1)))
