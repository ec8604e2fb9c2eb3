"""Wrappers of ComfyUI and what packs put into its functions, on the sampler's model and on a term's."""

import importlib
import logging

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import relative

STEPS = 3
ONCE = ("outer_sample", "prepare_sampling", "sampler_sample")
EACH_STEP = ("predict_noise", "calc_cond_batch", "apply_model", "diffusion_model")


@pytest.fixture(autouse=True)
def has_wrappers(comfy):
    try:
        return importlib.import_module("comfy.patcher_extension")
    except ModuleNotFoundError:
        pytest.skip("this ComfyUI has no wrappers")


@pytest.fixture
def kinds(has_wrappers):
    names = vars(has_wrappers.WrappersMP).values()
    return [kind for kind in (*ONCE, *EACH_STEP) if kind in names]


@pytest.fixture
def counting(kinds):
    """A clone that counts its wrappers' calls, by kind, and the guiders that they are told of."""

    def make(model):
        clone, counts, guiders = model.clone(), {}, []

        def wrapper(kind):
            def count(executor, *args, **kwargs):
                counts[kind] = counts.get(kind, 0) + 1
                if kind in ("outer_sample", "predict_noise"):
                    guiders.append(executor.class_obj)
                return executor(*args, **kwargs)

            return count

        for kind in kinds:
            clone.add_wrapper(kind, wrapper(kind))
        return clone, counts, guiders

    return make


def test_on_the_samplers_model_as_in_stock(gcfg, stock, counting, prior, concept, prompt, latent):
    model, counts, _ = counting(prior)
    stock(model, prompt(1), prompt(2), latent, steps=STEPS)
    expected = dict(counts)
    counts.clear()
    gcfg(model, prompt(2), [GuidanceTerm(7.5, conditioning=prompt(1))], latent, steps=STEPS)
    assert counts == expected
    counts.clear()
    terms = [GuidanceTerm(3.0, conditioning=prompt(1)), GuidanceTerm(2.0, model=concept, conditioning=prompt(3))]
    gcfg(model, prompt(2), terms, latent, steps=STEPS)
    assert counts == expected, "another model's term changes nothing"


@pytest.mark.parametrize("same_file", [False, True], ids=["another model", "a clone of the sampler's"])
def test_on_a_terms_model_each_lane_runs_in_its_own(gcfg, counting, kinds, prior, concept, prompt, latent, same_file):
    model, counts, guiders = counting(prior if same_file else concept)
    terms = [GuidanceTerm(3.0, conditioning=prompt(1)), GuidanceTerm(2.0, model=model, conditioning=prompt(3))]
    got = gcfg(prior, prompt(2), terms, latent, steps=STEPS)
    assert counts == {kind: 1 if kind in ONCE else STEPS for kind in kinds}
    assert {guider.model_patcher for guider in guiders} == {model}
    plain = [terms[0], GuidanceTerm(2.0, model=prior if same_file else concept, conditioning=prompt(3))]
    expected = gcfg(prior, prompt(2), plain, latent, steps=STEPS)
    assert relative(got, expected) < 2e-5


def test_two_terms_inside_wrappers_of_their_prediction(gcfg, counting, prior, concept, prompt, latent):
    """A wrapper around a guider's prediction knows one, so each term has a lane of its own."""
    model, counts, _ = counting(concept)
    terms = [GuidanceTerm(2.0, model=model, conditioning=prompt(seed)) for seed in (1, 3)]
    gcfg(prior, prompt(2), terms, latent, steps=STEPS)
    assert counts["predict_noise"] == 2 * STEPS
    counts.clear()
    gcfg(prior, prompt(2), [terms[0], terms[0]], latent, steps=STEPS)
    assert counts["predict_noise"] == STEPS, "the same prediction is evaluated once"


def test_options_that_a_wrapper_exchanges_hold_for_its_model_only(gcfg, prior, concept, prompt, latent):
    seen = {}

    def outer(executor, *args, **kwargs):
        import comfy.model_patcher

        guider = executor.class_obj
        before = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(before)
        guider.model_options["transformer_options"]["marker"] = "concept"
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = before

    def look(name):
        def see(executor, *args, **kwargs):
            options = kwargs.get("transformer_options") or next(a for a in args[::-1] if isinstance(a, dict))
            seen.setdefault(name, set()).add((options.get("marker"), "sample_sigmas" in options))
            return executor(*args, **kwargs)

        return see

    models = {"prior": prior.clone(), "concept": concept.clone()}
    models["concept"].add_wrapper("outer_sample", outer)
    for name, model in models.items():
        model.add_wrapper("diffusion_model", look(name))
    gcfg(models["prior"], prompt(0), [GuidanceTerm(2.0, model=models["concept"])], latent, steps=STEPS)
    assert seen == {"prior": {(None, True)}, "concept": {("concept", True)}}


def replacing(model, calls, name):
    """A clone whose wrapper puts a function into `comfy.samplers` for its run, as AnimateDiff does."""
    import comfy.samplers

    clone = model.clone()

    def outer(executor, *args, **kwargs):
        original = comfy.samplers.sampling_function

        def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None):
            calls.append((name, model_options["transformer_options"].get("marker")))
            return original(model, x, timestep, uncond, cond, cond_scale, model_options=model_options, seed=seed)

        comfy.samplers.sampling_function = sampling_function
        try:
            return executor(*args, **kwargs)
        finally:
            comfy.samplers.sampling_function = original

    clone.model_options["transformer_options"]["marker"] = name
    clone.add_wrapper("outer_sample", outer)
    return clone


def test_a_replaced_sampling_function_is_called_for_its_own_model(gcfg, stock, prior, concept, prompt, latent, comfy):
    before, calls = comfy.samplers.sampling_function, []
    model, other = replacing(prior, calls, "prior"), replacing(concept, calls, "concept")
    one = [GuidanceTerm(7.5, conditioning=prompt(1))]
    expected = stock(prior, prompt(1), prompt(2), latent, steps=STEPS)
    assert torch.equal(gcfg(model, prompt(2), one, latent, steps=STEPS), expected)
    assert calls == [("prior", "prior")] * STEPS
    both = [*one, GuidanceTerm(2.0, model=concept, conditioning=prompt(3))]
    expected = gcfg(prior, prompt(2), both, latent, steps=STEPS)
    for base, term, who in (
        (model, concept, {"prior"}),
        (prior, other, {"concept"}),
        (model, other, {"prior", "concept"}),
    ):
        calls.clear()
        terms = [*one, GuidanceTerm(2.0, model=term, conditioning=prompt(3))]
        got = gcfg(base, prompt(2), terms, latent, steps=STEPS)
        assert relative(got, expected) < 2e-5
        assert set(calls) == {(name, name) for name in who}
        assert comfy.samplers.sampling_function is before
    broken = concept.clone()
    broken.model_options["model_function_wrapper"] = lambda apply_model, args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        gcfg(model, prompt(2), [*one, GuidanceTerm(2.0, model=replacing(broken, calls, "broken"))], latent, steps=STEPS)
    assert comfy.samplers.sampling_function is before


def test_what_only_the_samplers_model_can_is_said(gcfg, prior, concept, prompt, latent, caplog):
    def noisy(executor, noise, *args, **kwargs):
        return executor(noise * 2, *args, **kwargs)

    model = concept.clone()
    model.add_wrapper("outer_sample", noisy)
    terms = [GuidanceTerm(2.0, model=model, conditioning=prompt(3), label="cats")]
    with caplog.at_level(logging.WARNING):
        got = gcfg(prior, prompt(2), terms, latent, steps=STEPS)
    plain = [GuidanceTerm(2.0, model=concept, conditioning=prompt(3))]
    assert torch.equal(got, gcfg(prior, prompt(2), plain, latent, steps=STEPS))
    (said,) = [line for line in caplog.messages if "only the sampler's model can" in line]
    assert said.startswith("GCFG: a wrapper on the model of Guidance Term 'cats' (")
    assert "noisy) changes noise of the sampling" in said


def core(module, name):
    try:
        return getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    except (ModuleNotFoundError, AttributeError):
        pytest.skip(f"this ComfyUI has no {name}")


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_caches_of_the_core_on_a_term(gcfg, stock, prior, concept, prompt, latent, request, name):
    """At weight 1 the sum is the term's own prediction: stock sampling of it at cfg 1, with as many steps skipped."""
    node = core("nodes_easycache", name)
    model = node.execute(concept, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False).result[0]
    calls = []  # of a layer, since a cache may stand inside the UNet's forward
    handle = concept.model.diffusion_model.time_embed.register_forward_pre_hook(lambda *args: calls.append(1))
    request.addfinalizer(handle.remove)
    expected = stock(model, prompt(1), prompt(1), latent, cfg=1.0, steps=8)
    assert 0 < len(calls) < 8, "the cache skips steps"
    made = len(calls)
    calls.clear()
    for _ in range(3):
        got = gcfg(prior, prompt(2), [GuidanceTerm(1.0, model=model, conditioning=prompt(1))], latent, steps=8)
        assert relative(got, expected) < 1e-4
    assert len(calls) == 3 * made
    kept = model.model_options["transformer_options"]["easycache"]
    assert not getattr(kept, "uuid_cache_diffs", None)
    assert getattr(kept, "cache_diff", None) is None, "nothing is kept after a run"


class TestCFGOverride:
    @pytest.fixture
    def override(self):
        node = core("nodes_custom_sampler", "CFGOverride")
        return lambda model, cfg, start=0.0, end=0.6: node.execute(model, cfg, start, end).result[0]

    def test_one_term_and_a_pair(self, gcfg, stock, prior, prompt, latent, override):
        for cfg in (2.0, 1.0, 5.0):
            model = override(prior, cfg)
            expected = stock(model, prompt(1), prompt(2), latent, cfg=5.0, steps=4)
            one = [GuidanceTerm(5.0, conditioning=prompt(1))]
            assert torch.equal(gcfg(model, prompt(2), one, latent), expected)
            two = [*one, GuidanceTerm(-4.0, conditioning=prompt(2))]
            assert torch.equal(gcfg(model, prompt(3), two, latent), expected)

    def test_on_the_model_of_one_term(self, gcfg, prior, concept, prompt, latent, override):
        control = GuidanceTerm(3.0, conditioning=prompt(1))
        model = override(concept, 4.0, 0.0, 1.0)
        got = gcfg(prior, prompt(0), [control, GuidanceTerm(2.0, model=model, conditioning=prompt(3))], latent)
        expected = gcfg(prior, prompt(0), [control, GuidanceTerm(4.0, model=concept, conditioning=prompt(3))], latent)
        assert torch.equal(got, expected)

    def test_several_weights_are_said(self, gcfg, prior, prompt, latent, override, caplog):
        terms = [GuidanceTerm(3.0, conditioning=prompt(seed)) for seed in (1, 2)]
        expected = gcfg(prior, prompt(0), terms, latent)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(gcfg(override(prior, 2.0), prompt(0), terms, latent), expected)
        (said,) = [line for line in caplog.messages if "CFG Override" in line]
        assert "2 terms act and it gives one weight" in said


@pytest.fixture
def pack_for_good(comfy, monkeypatch):
    """A pack that stands in the place of ComfyUI's functions from its import on, and reads settings of its own."""
    original, seen = comfy.samplers.sampling_function, []

    def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None):
        seen.append(cond_scale)
        scale = model_options.get("my_pack_scale", cond_scale)
        return original(model, x, timestep, uncond, cond, scale, model_options=model_options, seed=seed)

    def sample(self, *args, **kwargs):
        return ksampler(self, *args, **kwargs)

    ksampler = comfy.samplers.KSAMPLER.sample
    monkeypatch.setattr(comfy.samplers, "sampling_function", sampling_function)
    monkeypatch.setattr(comfy.samplers.KSAMPLER, "sample", sample)
    return seen


def test_a_pack_that_replaced_functions_for_good(gcfg, stock, prior, concept, prompt, latent, pack_for_good, caplog):
    """It is called for stock guidance, and its settings on a term's model are that term's rule."""
    model = prior.clone()
    model.model_options["my_pack_scale"] = 2.0
    expected = stock(model, prompt(1), prompt(2), latent, cfg=7.5, steps=STEPS)
    pack_for_good.clear()
    one = [GuidanceTerm(7.5, conditioning=prompt(1))]
    assert torch.equal(gcfg(model, prompt(2), one, latent, steps=STEPS), expected)
    assert pack_for_good == [7.5] * STEPS
    assert not [line for line in caplog.messages if "looks at the sampler's model only" in line]
    other = concept.clone()
    other.model_options["my_pack_scale"] = 2.0
    terms = [*one, GuidanceTerm(5.0, model=other, conditioning=prompt(3), label="cats")]
    got = gcfg(prior, prompt(2), terms, latent, steps=STEPS)
    (said,) = [line for line in caplog.messages if "looks at the sampler's model only" in line]
    assert "the model of Guidance Term 'cats' has settings for it (my_pack_scale)" in said
    terms = [*one, GuidanceTerm(2.0, model=concept, conditioning=prompt(3))]
    expected = gcfg(prior, prompt(2), terms, latent, steps=STEPS)
    assert relative(got, expected) < 2e-5


@pytest.mark.parametrize("kind", ["outer_sample", "sampler_sample", "predict_noise"])
def test_a_terms_wrapper_finds_stock_names(gcfg, prior, concept, prompt, latent, kind):
    seen = []

    def wrapper(executor, *args, **kwargs):
        guider = args[0] if kind == "sampler_sample" else executor.class_obj
        seen.append((set(guider.conds), guider.cfg))
        return executor(*args, **kwargs)

    model = concept.clone()
    model.add_wrapper(kind, wrapper)
    gcfg(prior, prompt(0), [GuidanceTerm(2.0, model=model, conditioning=prompt(1))], latent, steps=1)
    assert seen == [({"positive", "negative"}, 2.0)]


def halving(model):
    clone = model.clone()

    def half(executor, *args, **kwargs):
        guider = executor.class_obj
        before, guider.cfg = guider.cfg, guider.cfg * 0.5
        try:
            return executor(*args, **kwargs)
        finally:
            guider.cfg = before

    clone.add_wrapper("predict_noise", half)
    return clone


def test_the_cfg_that_a_wrapper_sees_is_the_weight_of_the_step(gcfg, stock, prior, prompt, latent):
    from comfyui_gcfg.gcfg.curves import WeightCurve

    pair = [GuidanceTerm(6.0, conditioning=prompt(1)), GuidanceTerm(-5.0, conditioning=prompt(2))]
    expected = stock(prior, prompt(1), prompt(2), latent, cfg=3.0)
    assert torch.equal(gcfg(halving(prior), prompt(0), pair, latent), expected)

    def falling(start, end):
        return [GuidanceTerm(start, conditioning=prompt(1), curve=WeightCurve("linear", end))]

    got = gcfg(halving(prior), prompt(0), falling(6.0, 1.0), latent)
    assert torch.equal(got, gcfg(prior, prompt(0), falling(3.0, 0.5), latent))


def test_a_wrapper_before_a_branch_acts_once(gcfg, prior, prompt, latent):
    def louder(executor, *args, **kwargs):
        return executor(*args, **kwargs) * 0.9

    shared = prior.clone()
    shared.add_wrapper("predict_noise", louder)
    branch = shared.clone()
    branch.set_model_attn2_patch(lambda n, k, v, extra: (n, k * 0.5, v))
    plain = prior.clone()
    plain.set_model_attn2_patch(lambda n, k, v, extra: (n, k * 0.5, v))
    got = gcfg(shared, prompt(0), [GuidanceTerm(2.0, model=branch, conditioning=prompt(1))], latent, steps=2)
    expected = gcfg(shared, prompt(0), [GuidanceTerm(2.0, model=plain, conditioning=prompt(1))], latent, steps=2)
    assert torch.equal(got, expected)


def test_a_wrapper_among_the_options_of_two_terms(gcfg, has_wrappers, prior, concept, prompt, latent):
    model, calls = concept.clone(), []

    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    has_wrappers.add_wrapper_with_key("predict_noise", "test", count, model.model_options, is_model_options=True)
    terms = [GuidanceTerm(2.0, model=model, conditioning=prompt(seed)) for seed in (1, 3)]
    gcfg(prior, prompt(2), terms, latent, steps=STEPS)
    assert len(calls) == 2 * STEPS


@pytest.mark.parametrize("kind", ["outer_sample", "sampler_sample"])
def test_a_terms_wrapper_may_pass_on_by_name(gcfg, prior, concept, prompt, latent, kind, caplog):
    """Stock's functions take their arguments by name as well as by place, and a copy of a number is no change."""

    def outer(executor, noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs):
        given = {
            "denoise_mask": denoise_mask,
            "callback": callback,
            "disable_pbar": disable_pbar,
            "seed": int(str(seed)),
        }
        return executor(noise, latent_image, sampler, sigmas, **given, **kwargs)

    def inner(executor, model_wrap, sigmas, extra_args, callback, noise, *args):
        names = ("latent_image", "denoise_mask", "disable_pbar")
        given = {"callback": callback, "noise": noise, **dict(zip(names, args, strict=True))}
        return executor(model_wrap, sigmas, extra_args, **given)

    model = concept.clone()
    model.add_wrapper(kind, outer if kind == "outer_sample" else inner)
    terms = [GuidanceTerm(2.0, model=model, conditioning=prompt(1))]
    got = gcfg(prior, prompt(0), terms, latent, seed=10**9, steps=1)
    plain = [GuidanceTerm(2.0, model=concept, conditioning=prompt(1))]
    assert torch.equal(got, gcfg(prior, prompt(0), plain, latent, seed=10**9, steps=1))
    assert not [line for line in caplog.messages if "only the sampler's model can" in line]
