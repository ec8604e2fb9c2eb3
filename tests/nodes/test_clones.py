"""Clones of one base with different patches give, to the last bit, what separately loaded models give."""

import copy
import gc
import itertools
from functools import partial

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal


def v_prediction(model):
    """A clone that reads the same weights as a v-prediction model, as ModelSamplingDiscrete makes it."""
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    clone = model.clone()
    clone.add_object_patch("model_sampling", Sampling(clone.model.model_config))
    return clone


def other_out(model):
    """A clone with another last layer, put there as an object patch."""
    clone = model.clone()
    out = copy.deepcopy(clone.get_model_object("diffusion_model.out"))
    for parameter in out.parameters():
        parameter.data.mul_(0.9)
    clone.add_object_patch("diffusion_model.out", out)
    return clone


def wrapped_weight(model):
    """A clone with a weight wrapper, as fp8 and training nodes add them."""
    if not hasattr(model, "add_weight_wrapper"):
        pytest.skip("this ComfyUI has no weight wrappers")
    clone = model.clone()
    clone.add_weight_wrapper("diffusion_model.out.2.weight", lambda weight: weight * 0.9)
    return clone


def injected(model):
    """A clone that changes its module while it is loaded, as motion-module packs do."""
    if not hasattr(model, "set_injections"):
        pytest.skip("this ComfyUI has no injections")
    import comfy.model_patcher

    def inject(patcher):
        unet = patcher.model.diffusion_model
        unet.out = torch.nn.Sequential(unet.out, torch.nn.Hardtanh(-0.5, 0.5))

    def eject(patcher):
        patcher.model.diffusion_model.out = patcher.model.diffusion_model.out[0]

    clone = model.clone()
    clone.set_injections("test", [comfy.model_patcher.PatcherInjection(inject, eject)])
    return clone


@pytest.fixture(scope="module")
def variants(lora, prompt):
    from comfyui_gcfg.nodes.runtime.null_text import patch_null_text

    return {
        "plain": lambda model: model,
        "lora 1": lambda model: lora(model, 1),
        "lora 2": lambda model: lora(model, 2),
        "v": v_prediction,
        "v and lora": lambda model: v_prediction(lora(model, 1)),
        "out": other_out,
        "wrapper": wrapped_weight,
        "injection": injected,
        "null": lambda model: patch_null_text(model, prompt(9), "uniform_mean"),
        "null and lora": lambda model: patch_null_text(lora(model, 1), prompt(9), "uniform_mean"),
    }


@pytest.fixture(scope="module")
def gcfg(gcfg):
    """Our KSampler in two steps: the second one meets what the first one left behind."""
    return partial(gcfg, steps=2)


@pytest.fixture(scope="module")
def separate_loads(load_unet, weights, variants, gcfg, prompt):
    """The result with every model of a run loaded on its own, by the names of base and terms."""
    loaded, results = {}, {}

    def load(name, number):
        """The variant's own model; a run that has the variant twice takes two of them."""
        if (name, number) not in loaded:
            loaded[name, number] = variants[name](load_unet(weights("sd15", 0)))
        return loaded[name, number]

    def run(*names):
        if names not in results:
            base, *terms = (load(name, names[:place].count(name)) for place, name in enumerate(names))
            results[names] = gcfg(base, prompt(0), _terms(terms, prompt), _latent())
        return results[names]

    with torch.inference_mode():
        yield run


def _latent():
    return {"samples": torch.zeros(1, 4, 8, 8)}


def _terms(models, prompt):
    return [
        GuidanceTerm(3.0 - index, model=model, conditioning=prompt(index + 1), label=str(index))
        for index, model in enumerate(models)
    ]


CASES = [
    ("plain", "lora 1", "lora 2"),
    ("lora 1", "lora 2", "plain"),
    ("plain", "v"),
    ("v", "plain", "lora 1"),
    ("lora 1", "v and lora", "v"),
    ("plain", "out", "lora 1"),
    ("lora 2", "lora 2", "lora 1"),
    ("plain", "wrapper", "lora 1"),
    ("plain", "injection"),
    ("injection", "plain", "lora 1"),
    ("plain", "null"),
    ("null", "plain", "lora 1"),
    ("plain", "null and lora", "null", "lora 2"),
]


@pytest.mark.parametrize("case", CASES, ids=" | ".join)
def test_equal_to_separate_loads(load_unet, weights, variants, gcfg, prompt, separate_loads, case):
    base = load_unet(weights("sd15", 0))
    models = [variants[name](base) for name in case]
    got = gcfg(models[0], prompt(0), _terms(models[1:], prompt), _latent())
    assert torch.equal(got, separate_loads(*case))
    unpatched = separate_loads(*["plain"] * len(case))
    assert not torch.allclose(got, unpatched, rtol=1e-2), "the patches do something"


def test_two_clones_of_equal_weights_keep_their_own_options(load_unet, weights, variants, gcfg, prompt, separate_loads):
    """Both go to one private module, the second with its wrapper."""
    base = load_unet(weights("sd15", 0))
    lora = variants["lora 1"](base)
    models = [lora, variants["null"](lora)]
    got = gcfg(base, prompt(0), _terms(models, prompt), _latent())
    assert torch.equal(got, separate_loads("plain", "lora 1", "null and lora"))


def test_every_loading_order_and_ten_runs(comfy, load_unet, weights, variants, gcfg, prompt, separate_loads):
    names = ("plain", "lora 1", "lora 2")
    base = load_unet(weights("sd15", 0))
    models = {name: variants[name](base) for name in names}
    orders = list(itertools.permutations(names))
    for run in range(10):
        for name in orders[run % len(orders)]:
            comfy.model_management.load_models_gpu([models[name]])
        case = orders[(run * 5 + 1) % len(orders)]
        got = gcfg(models[case[0]], prompt(0), _terms([models[name] for name in case[1:]], prompt), _latent())
        assert torch.equal(got, separate_loads(*case)), f"run {run}"


def test_naive_clones_are_wrong(comfy, load_unet, weights, variants, gcfg, prompt, separate_loads, monkeypatch):
    """The trap is real: without separation the same run gives another image."""
    from comfyui_gcfg.nodes.runtime import guider

    monkeypatch.setattr(guider, "separate", lambda patchers, in_place: list(patchers))
    case = ("plain", "lora 1", "lora 2")
    base = load_unet(weights("sd15", 0))
    models = [variants[name](base) for name in case]
    got = gcfg(models[0], prompt(0), _terms(models[1:], prompt), _latent())
    assert not torch.allclose(got, separate_loads(*case), rtol=1e-3)


def test_base_is_left_clean_and_copy_dies_with_its_clone(load_unet, weights, variants, gcfg, prompt, latent):
    from comfyui_gcfg.nodes.runtime import clones

    base = load_unet(weights("sd15", 0))
    before = gcfg(base, prompt(0), _terms([None], prompt), latent)
    models = [variants["lora 1"](base), variants["lora 2"](base)]
    gcfg(base, prompt(0), _terms(models, prompt), latent)
    assert torch.equal(gcfg(base, prompt(0), _terms([None], prompt), latent), before)
    gc.collect()  # what other tests left behind
    kept = len(clones._copies)
    assert kept >= 2
    del models
    gc.collect()
    assert len(clones._copies) == kept - 2


def test_cpu_copy_costs_the_patched_weights_only(load_unet, weights, variants):
    from comfyui_gcfg.nodes.runtime.clones import separate

    base = load_unet(weights("sd15", 0))
    _, private = separate([base, variants["lora 1"](base)])
    own = {p.data_ptr() for p in base.model.parameters()}
    assert private.model is not base.model
    assert all(p.data_ptr() in own for p in private.model.parameters())
    assert not {id(p) for p in base.model.parameters()} & {id(p) for p in private.model.parameters()}


def test_same_patches_share_one_model(load_unet, weights, variants, gcfg, prompt, latent, count_forwards):
    base = load_unet(weights("sd15", 0))
    clone = variants["lora 1"](base)
    calls = count_forwards(base)
    gcfg(clone, prompt(0), _terms([clone, clone.clone()], prompt), latent)
    assert {batch for _, batch in calls} == {3}, "one batched call for both terms and the unconditional"


def test_patch_that_holds_a_shared_module_is_refused(load_unet, weights, variants, gcfg, prompt, latent):
    base = load_unet(weights("sd15", 0))
    clone = base.clone()
    shared = clone.model.diffusion_model.out
    clone.add_object_patch("diffusion_model.out", torch.nn.Sequential(shared))
    assert refusal(gcfg, base, prompt(0), _terms([clone], prompt), latent) == (
        "GCFG: BaseModel is used twice with different patches, and the patch on 'diffusion_model.out' holds a part of "
        "the shared model, so the two cannot be separated; load the model for one of the terms from a second file."
    )
    assert torch.isfinite(gcfg(base, prompt(0), _terms([None], prompt), latent)).all()


def test_special_weights_are_refused(load_unet, weights, variants, gcfg, prompt, latent):
    class Packed(torch.Tensor):
        pass

    base = load_unet(weights("sd15", 0))
    layer = base.model.diffusion_model.out[2]
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False)
    with pytest.raises(GuidanceError, match=r"weight diffusion_model.out.2.weight is of the special kind Packed"):
        gcfg(base, prompt(0), _terms([variants["lora 1"](base)], prompt), latent)


def shifted(model):
    """A clone with another continuous schedule, as ModelSamplingContinuousEDM makes it."""
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.V_PREDICTION):
        pass

    clone = model.clone()
    sampling = Sampling(clone.model.model_config)
    sampling.set_parameters(0.002, 120.0, 0.5)
    clone.add_object_patch("model_sampling", sampling)
    return clone


RUNS = ("stock raw", "stock clone", "raw, clone", "clone, raw", "clone, clone")


@pytest.mark.parametrize("make", [v_prediction, shifted], ids=["v", "edm"])
@pytest.mark.parametrize("order", itertools.permutations(RUNS, 2), ids=" | ".join)
def test_every_order_with_stock_runs_needs_no_copy(load_unet, weights, gcfg, stock, prompt, make, order, kept_results):
    """Another model_sampling is no weight: one module, whichever was sampled before, by stock or by us."""
    from comfyui_gcfg.nodes.runtime import clones

    def results(raw, clone, second):
        def run(name):
            if name.startswith("stock"):
                model = raw if name == "stock raw" else clone
                return stock(model, prompt(1), prompt(2), _latent(), steps=2)
            first, other = ({"raw": raw, "clone": clone}[part] for part in name.split(", "))
            term = second if other is first else other
            return gcfg(first, prompt(0), _terms([None, term], prompt), _latent())

        return run

    if make not in kept_results:  # every model from a file of its own, alone in its process's memory
        raw, clone, second = load_unet(weights("sd15", 0)), *(make(load_unet(weights("sd15", 0))) for _ in range(2))
        alone = results(raw, clone, second)
        kept_results[make] = {name: alone(name) for name in RUNS}
    base = load_unet(weights("sd15", 0))
    made, clone = len(clones._copies), make(base)
    run = results(base, clone, make(base))
    for name in order:
        assert torch.equal(run(name), kept_results[make][name]), name
    assert len(clones._copies) <= made


@pytest.fixture(scope="module")
def kept_results():
    """References by what makes the clone."""
    return {}


def test_a_function_in_a_methods_place_is_put_in_place(load_unet, weights, gcfg, prompt, separate_loads):
    """It may hold the shared module, because it stays with it: many packs patch a block's forward so."""

    def louder(model):
        clone = model.clone()
        block = clone.model.diffusion_model.middle_block[0]
        forward = type(block).forward
        clone.add_object_patch(
            "diffusion_model.middle_block.0.forward", lambda *args, **kwargs: 1.2 * forward(block, *args, **kwargs)
        )
        return clone

    base, own = load_unet(weights("sd15", 0)), louder(load_unet(weights("sd15", 0)))
    for _ in range(2):
        got = gcfg(base, prompt(0), _terms([louder(base)], prompt), _latent())
        assert torch.equal(got, gcfg(load_unet(weights("sd15", 0)), prompt(0), _terms([own], prompt), _latent()))
    assert not torch.allclose(got, separate_loads("plain", "plain"), rtol=1e-2)
    plain = gcfg(base, prompt(0), _terms([base], prompt), _latent())
    assert torch.allclose(plain, separate_loads("plain", "plain"), rtol=1e-4, atol=1e-3), "and nothing of it stays"


def test_a_wrapper_that_holds_the_shared_module_is_refused(load_unet, weights, variants, gcfg, prompt):
    """A cache of another pack that patches the module it was given would act on the wrong weights."""
    base = load_unet(weights("sd15", 0))
    lora = variants["lora 1"](base)
    unet = lora.model.diffusion_model

    def cache(apply_model, args):
        unet.cached = True
        return apply_model(args["input"], args["timestep"], **args["c"])

    lora.set_model_unet_function_wrapper(cache)
    said = refusal(gcfg, base, prompt(0), _terms([lora], prompt), _latent())
    assert "a wrapper of one (" in said
    assert "cache) holds a part of the shared model, so it would act on the wrong weights" in said
    assert torch.isfinite(gcfg(lora, prompt(0), _terms([None], prompt), _latent())).all()


def test_a_cache_on_two_models_is_said(load_unet, weights, gcfg, prompt, caplog):
    def cache(apply_model, args):
        return apply_model(args["input"], args["timestep"], **args["c"])

    models = [load_unet(weights("sd15", seed)).clone() for seed in (0, 1)]
    for model in models:
        model.set_model_unet_function_wrapper(cache)
    gcfg(models[0], prompt(0), _terms([models[1]], prompt), _latent())
    (said,) = [line for line in caplog.messages if "carry the cache" in line]
    assert said.startswith("GCFG: 2 models of this run carry the cache ")
    caplog.clear()
    gcfg(models[0], prompt(0), _terms([None], prompt), _latent())
    assert not [line for line in caplog.messages if "carry the cache" in line]
