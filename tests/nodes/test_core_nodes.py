"""Every guidance node of ComfyUI's core, on the sampler's model, with a pair, and on a term's model.

The references are stock sampling: of the same graph, or of models that were loaded separately, with a prediction put in
where the sum has another one.
"""

import contextlib
import copy
import importlib
import inspect
import math

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm

# (module of comfy_extras, class, inputs); what a version lacks is left out there.
NODES = {
    "RescaleCFG": ("nodes_model_advanced", "RescaleCFG", {"multiplier": 0.7}),
    "PAG": ("nodes_pag", "PerturbedAttentionGuidance", {"scale": 3.0}),
    "SAG": ("nodes_sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    "PerpNeg": ("nodes_perpneg", "PerpNeg", {"empty_conditioning": "prompt", "neg_scale": 1.0}),
    "APG": ("nodes_apg", "APG", {"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.5}),
    "CFG-Zero*": ("nodes_cfg", "CFGZeroStar", {}),
    "CFGNorm": ("nodes_cfg", "CFGNorm", {"strength": 0.9}),
    "CFGNorm, before": ("nodes_cfg", "CFGNorm", {"strength": 0.9, "pre_cfg": True}),
    "Mahiro": ("nodes_mahiro", "Mahiro", {}),
    "TCFG": ("nodes_tcfg", "TCFG", {}),
    "FreSca": ("nodes_fresca", "FreSca", {"scale_low": 1.0, "scale_high": 1.5, "freq_cutoff": 2}),
    "EpsilonScaling": ("nodes_eps", "EpsilonScaling", {"scaling_factor": 1.02}),
    "TSR": ("nodes_eps", "TemporalScoreRescaling", {"tsr_k": 0.9, "tsr_sigma": 1.0}),
    "RenormCFG": ("nodes_lumina2", "RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 1.0}),
    "LatentApplyOperationCFG": ("nodes_latent", "LatentApplyOperationCFG", {"operation": "tonemap"}),
    "VideoLinearCFG": ("nodes_video_model", "VideoLinearCFGGuidance", {"min_cfg": 1.0}),
    "VideoTriangleCFG": ("nodes_video_model", "VideoTriangleCFGGuidance", {"min_cfg": 1.0}),
    "NAG": ("nodes_nag", "NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}),
    "AttentionMultiply": (
        "nodes_attention_multiply",
        "UNetSelfAttentionMultiply",
        {"q": 1.1, "k": 1, "v": 0.9, "out": 1},
    ),
}
TRANSFORMER_NODES = {
    "RescaleCFG": NODES["RescaleCFG"],
    "APG": NODES["APG"],
    "CFG-Zero*": NODES["CFG-Zero*"],
    "SLG": (
        "nodes_slg",
        "SkipLayerGuidanceDiT",
        {"double_layers": "0", "single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    ),
    "SLG simple": (
        "nodes_slg",
        "SkipLayerGuidanceDiTSimple",
        {"double_layers": "0", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0},
    ),
    "SLG SD3": (
        "nodes_sd3",
        "SkipLayerGuidanceSD3",
        {"layers": "0", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0},
    ),
}
EVALUATION = ("AttentionMultiply", "NAG")  # change the predictions, not their combination
REPLACING = ("RescaleCFG", "PerpNeg", "APG", "TCFG", "FreSca", "RenormCFG", "LatentApplyOperationCFG")
REPLACING += ("VideoLinearCFG", "VideoTriangleCFG", "CFGNorm, before")
FLOW_SIGMAS = (0.8, 0.0)
SIGMAS = (6.0, 0.0)  # one step to 0, whose result is the prediction itself
CLOSE = 2e-5  # the same float32 operations in another order


def find(module):
    if module == "nodes_latent":
        find("nodes_post_processing")  # the two import each other, and only this order works
    for name in (f"comfy_extras.{module}", f"comfy_extras.nodes.{module}"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return None


def run_node(cls, **inputs):
    """A node's first output, in either of ComfyUI's node APIs."""
    if hasattr(cls, "execute"):
        return cls.execute(**inputs).result[0]
    return getattr(cls(), cls.FUNCTION)(**inputs)[0]


@pytest.fixture
def put(prompt):
    """Put a core node on a model."""

    def on(model, node, width=768):
        module, name, inputs = node
        cls = getattr(find(module), name, None)
        if cls is None:
            pytest.skip(f"this ComfyUI has no {name}")
        inputs = dict(inputs)
        if "empty_conditioning" in inputs:
            inputs["empty_conditioning"] = prompt(9, width)
        if "operation" in inputs:
            inputs["operation"] = run_node(find("nodes_latent").LatentOperationTonemapReinhard, multiplier=1.2)
        method = getattr(cls, "execute", None) or getattr(cls, getattr(cls, "FUNCTION", ""))
        if not set(inputs) <= set(inspect.signature(method).parameters):
            pytest.skip(f"this ComfyUI's {name} has not all of {', '.join(inputs)}")
        return run_node(cls, model=model, **inputs)

    return on


@pytest.fixture(params=NODES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def transformer(comfy):
    """A small SD3, which is a flow model."""
    import comfy.model_patcher
    import comfy.supported_models

    config = {
        "in_channels": 16,
        "patch_size": 2,
        "out_channels": 16,
        "depth": 2,
        "input_size": None,
        "adm_in_channels": 32,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
        "num_patches": 64,
        "pos_embed_max_size": 8,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms",
    }

    def make(seed):
        found = comfy.supported_models.SD3(copy.deepcopy(config))
        if hasattr(found, "set_inference_dtype"):
            found.set_inference_dtype(torch.float32, None)
        model = found.get_model({}, "", device=None)
        generator = torch.Generator().manual_seed(seed)
        for parameter in (*model.diffusion_model.parameters(), *model.diffusion_model.buffers()):
            fan = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan)
        cls = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        return cls(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))

    return make


@pytest.fixture
def short():
    """A CONDITIONING of the small SD3."""

    def make(seed):
        generator = torch.Generator().manual_seed(seed)
        tokens, pooled = torch.randn(1, 7, 24, generator=generator), torch.randn(1, 32, generator=generator)
        return [[tokens, {"pooled_output": pooled}]]

    return make


def pair(w, positive, negative):
    return [GuidanceTerm(w, conditioning=positive), GuidanceTerm(1.0 - w, conditioning=negative)]


def test_one_term_is_stock(gcfg, stock, put, prior, prompt, latent, name):
    model = put(prior, NODES[name])
    expected = stock(model, prompt(1), prompt(2), latent, cfg=5.0, steps=2)
    terms = [GuidanceTerm(5.0, conditioning=prompt(1))]
    assert torch.equal(gcfg(model, prompt(2), terms, latent, steps=2), expected)
    assert not torch.equal(expected, stock(prior, prompt(1), prompt(2), latent, cfg=5.0, steps=2)), "the node acts"


@pytest.mark.parametrize("order", [1, -1])
def test_a_pair_is_stock_with_a_negative_prompt(gcfg, stock, put, prior, prompt, latent, name, count_forwards, order):
    model = put(prior, NODES[name])
    calls = count_forwards(prior)
    expected = stock(model, prompt(1), prompt(2), latent, cfg=5.0, steps=2)
    made = list(calls)
    calls.clear()
    terms = pair(5.0, prompt(1), prompt(2))[::order]
    assert torch.equal(gcfg(model, prompt(3), terms, latent, steps=2), expected)
    assert calls == made, "and at its cost"


@pytest.mark.parametrize("kind", ["one term", "pair"])
@pytest.mark.parametrize("name", TRANSFORMER_NODES)
def test_a_transformer(gcfg, stock, put, transformer, short, name, kind):
    model, image = put(transformer(0), TRANSFORMER_NODES[name]), {"samples": torch.zeros(1, 16, 8, 8)}
    expected = stock(model, short(1), short(2), image, cfg=5.0)
    one = [GuidanceTerm(5.0, conditioning=short(1))]
    terms, unconditional = (one, short(2)) if kind == "one term" else (pair(5.0, short(1), short(2)), short(3))
    assert torch.isfinite(expected).all()
    assert torch.equal(gcfg(model, unconditional, terms, image), expected)


def cfg_pp_samplers(comfy):
    return [name for name in comfy.samplers.KSampler.SAMPLERS if name.endswith("_cfg_pp")]


def test_cfg_pp_samplers(gcfg, stock, prior, put, prompt, latent, comfy):
    for sampler in cfg_pp_samplers(comfy):
        for model in (prior, put(prior, NODES["RescaleCFG"])):
            settings = {"steps": 3, "sampler": sampler}
            expected = stock(model, prompt(1), prompt(2), latent, cfg=1.5, **settings)
            one = [GuidanceTerm(1.5, conditioning=prompt(1))]
            assert torch.equal(gcfg(model, prompt(2), one, latent, **settings), expected), sampler
            two = pair(1.5, prompt(1), prompt(2))
            assert torch.equal(gcfg(model, prompt(3), two, latent, **settings), expected), sampler


@pytest.fixture
def one_step(comfy):
    """The result of one step from sigma 6 (a flow model's: 0.8) to 0 of a guider; that is its prediction."""

    def run(guider):
        model = guider.model_patcher.model
        channels = model.latent_format.latent_channels
        noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(1))
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.tensor(SIGMAS if channels == 4 else FLOW_SIGMAS)
        image = torch.zeros(1, channels, 8, 8)
        return model.process_latent_in(guider.sample(noise, image, sampler, sigmas, disable_pbar=True, seed=1))

    return run


@pytest.fixture
def stock_step(one_step, comfy):
    """The same by ComfyUI's own guider, with predictions put in place of those that it evaluates."""

    def run(model, positive, negative, cfg=1.0, cond=None, uncond=None, total=None):
        if total is not None:  # in place of the combination
            model = model.clone()
            model.set_model_sampler_cfg_function(lambda args: args["input"] - total)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        original = comfy.samplers.calc_cond_batch

        def calc(model, conds, *args, **kwargs):
            out = original(model, conds, *args, **kwargs)
            if len(conds) != 2:  # a hook's own evaluation
                return out
            return [out[0] if cond is None else cond, out[1] if uncond is None else uncond]

        comfy.samplers.calc_cond_batch = calc
        try:
            return one_step(guider)
        finally:
            comfy.samplers.calc_cond_batch = original

    return run


@pytest.fixture
def gcfg_step(one_step):
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    return lambda model, unconditional, terms: one_step(GCFGGuider(model, unconditional, terms, "Test"))


@pytest.fixture(scope="module")
def separate(load_unet, weights):
    """Models of their own for the references, by seed."""
    return {seed: load_unet(weights("sd15", seed)) for seed in (0, 1)}


def close(got, expected):
    return float((got - expected).abs().max() / expected.abs().max()) < CLOSE


def test_on_a_terms_model_it_is_that_terms_rule(gcfg_step, stock_step, put, prior, concept, separate, prompt, name):
    """H(D_0, D_2, 2) - D_0, with the term's model, beside another term: stock guidance of it with D_0 put in."""
    base, control = (stock_step(separate[0], prompt(seed), prompt(0)) for seed in (0, 1))
    rule = stock_step(put(separate[1], NODES[name]), prompt(2), prompt(0), 2.0, uncond=base)
    expected = base + 3.0 * (control - base) + (rule - base)
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(2.0, model=put(concept, NODES[name]), conditioning=prompt(2)),
    ]
    got = gcfg_step(prior, prompt(0), terms)
    assert close(got, expected)
    terms[1] = GuidanceTerm(2.0, model=concept, conditioning=prompt(2))
    assert not close(got, gcfg_step(prior, prompt(0), terms)), "the node acts"
    alone = gcfg_step(prior, prompt(0), [GuidanceTerm(2.0, model=put(concept, NODES[name]), conditioning=prompt(2))])
    assert close(alone, rule)


@pytest.mark.parametrize("name", TRANSFORMER_NODES)
def test_a_transformer_on_a_term_and_on_the_sum(gcfg_step, stock_step, put, transformer, short, name):
    own, other = transformer(0), transformer(1)
    base, control = (stock_step(transformer(0), short(seed), short(0)) for seed in (0, 1))
    node = TRANSFORMER_NODES[name]
    rule = stock_step(put(transformer(1), node), short(2), short(0), 2.0, uncond=base)
    terms = [
        GuidanceTerm(3.0, conditioning=short(1)),
        GuidanceTerm(2.0, model=put(other, node), conditioning=short(2)),
    ]
    assert close(gcfg_step(own, short(0), terms), base + 3.0 * (control - base) + (rule - base))
    plain = stock_step(transformer(1), short(2), short(0))
    total = base + 3.0 * (control - base) + 2.0 * (plain - base)
    put_in = {"cond": base + (total - base) / 5.0} if name in REPLACING else {"total": total}
    terms[1] = GuidanceTerm(2.0, model=other, conditioning=short(2))
    if name == "SLG simple":  # it changes how the unconditional is predicted
        skipped = stock_step(put(transformer(0), node), short(1), short(0), 0.0)
        expected = skipped + 3.0 * (control - skipped) + 2.0 * (plain - skipped)
    else:
        expected = stock_step(put(transformer(0), node), short(1), short(0), 5.0, uncond=base, **put_in)
    assert close(gcfg_step(put(own, node), short(0), terms), expected)


def test_two_rules_in_one_run(gcfg_step, stock_step, put, prior, concept, separate, prompt):
    names = ("RescaleCFG", "PAG")
    base = stock_step(separate[0], prompt(0), prompt(0))
    rules = [
        stock_step(put(separate[seed], NODES[name]), prompt(2 + seed), prompt(0), 2.0 + seed, uncond=base)
        for seed, name in enumerate(names)
    ]
    terms = [
        GuidanceTerm(2.0 + seed, model=put((prior, concept)[seed], NODES[name]), conditioning=prompt(2 + seed))
        for seed, name in enumerate(names)
    ]
    expected = base + sum(rule - base for rule in rules)
    assert close(gcfg_step(prior, prompt(0), terms), expected)
    assert close(gcfg_step(prior, prompt(0), terms[::-1]), expected)


def test_a_rule_within_a_mask(gcfg_step, stock_step, put, prior, concept, separate, prompt):
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1.0
    base = stock_step(separate[0], prompt(0), prompt(0))
    rule = stock_step(put(separate[1], NODES["PAG"]), prompt(2), prompt(0), 2.0, uncond=base)
    term = GuidanceTerm(2.0, model=put(concept, NODES["PAG"]), conditioning=prompt(2), mask=mask)
    assert close(gcfg_step(prior, prompt(0), [term]), base + mask * (rule - base))


def test_a_pair_of_another_model_is_stock_guidance_of_it(
    gcfg, stock, put, prior, concept, separate, prompt, latent, name
):
    model = put(concept, NODES[name])
    terms = [
        GuidanceTerm(5.0, model=model, conditioning=prompt(1)),
        GuidanceTerm(-4.0, model=model, conditioning=prompt(2)),
    ]
    expected = stock(put(separate[1], NODES[name]), prompt(1), prompt(2), latent, cfg=5.0, steps=2)
    assert torch.equal(gcfg(prior, prompt(0), terms, latent, steps=2), expected)


def test_on_the_samplers_model_it_acts_on_the_sum(gcfg_step, stock_step, put, prior, concept, separate, prompt, name):
    """Hooks that replace the combination get the effective pair; the others the sum, and the term's own prediction."""
    if name in EVALUATION:
        pytest.skip("no guidance hook")
    base, control = (stock_step(separate[0], prompt(seed), prompt(0)) for seed in (0, 1))
    other = stock_step(separate[1], prompt(2), prompt(0))
    total = base + 3.0 * (control - base) + 2.0 * (other - base)
    put_in = {"cond": base + (total - base) / 5.0} if name in REPLACING else {"total": total}
    expected = stock_step(put(separate[0], NODES[name]), prompt(1), prompt(0), 5.0, uncond=base, **put_in)
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(2.0, model=concept, conditioning=prompt(2)),
    ]
    assert close(gcfg_step(put(prior, NODES[name]), prompt(0), terms), expected)


def test_evaluating_again_on_a_concept_only_graph(gcfg_step, stock_step, put, prior, concept, separate, prompt):
    """PAG of scale 3 adds 3 (D_0 - perturbed D_0), whatever the concept's weight is."""
    base = stock_step(separate[0], prompt(0), prompt(0))
    pag = stock_step(put(separate[0], NODES["PAG"]), prompt(0), prompt(0)) - base
    other = stock_step(separate[1], prompt(0), prompt(0))
    got = gcfg_step(put(prior, NODES["PAG"]), prompt(0), [GuidanceTerm(2.0, model=concept)])
    assert close(got, base + 2.0 * (other - base) + pag)
    assert float(pag.abs().max()) > 0.01 * float(base.abs().max())


def test_a_node_before_a_branch_acts_once(gcfg_step, put, prior, prompt, comfy):
    """Its hook is on the sampler's model and on the term's, and acts on the sum only."""
    shared = put(prior, NODES["RescaleCFG"])
    clone = shared.clone()
    terms = [GuidanceTerm(5.0, model=clone, conditioning=prompt(1))]
    expected = gcfg_step(shared, prompt(0), [GuidanceTerm(5.0, conditioning=prompt(1))])
    assert torch.equal(gcfg_step(shared, prompt(0), terms), expected)


@pytest.mark.parametrize("on", ["sampler", "term"])
def test_in_a_sweep_each_cell_is_a_run_of_its_own(gcfg, put, prior, concept, prompt, latent, on):
    """APG with momentum keeps what it saw at the last step."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider
    from comfyui_gcfg.nodes.runtime.ksampler import sample_cells

    model = put(prior, NODES["APG"]) if on == "sampler" else prior
    other = put(concept, NODES["APG"]) if on == "term" else concept

    def terms(a, b):
        return (GuidanceTerm(a, conditioning=prompt(1)), GuidanceTerm(b, model=other, conditioning=prompt(2)))

    cells = [terms(a, b) for b in (1.5, 3.0) for a in (2.0, 4.0)]
    guiders = [GCFGGuider(model, prompt(0), cell, "Test") for cell in cells]
    settings = {"seed": 1, "steps": 3, "sampler_name": "euler", "scheduler": "normal"}
    got = sample_cells(guiders, latent, **settings)["samples"]
    expected = torch.cat([gcfg(model, prompt(0), cell, latent, steps=3) for cell in cells])
    assert torch.equal(got, expected)


def test_a_rule_with_guidance_cache(gcfg, put, prior, concept, prompt, latent, count_forwards):
    """k = 1 is the full run to the last bit; k = 2 carries the prediction on, and the rule acts on it at every step."""
    from comfyui_gcfg.gcfg.guidance_cache import CacheRule

    model, steps = put(concept, NODES["RescaleCFG"]), 6

    def run(every, model=model):
        rule = None if every is None else CacheRule(every=every)
        terms = [
            GuidanceTerm(3.0, conditioning=prompt(1), cache_rule=rule),
            GuidanceTerm(2.0, model=model, conditioning=prompt(2), cache_rule=rule),
        ]
        return gcfg(prior, prompt(0), terms, latent, steps=steps)

    full = run(None)
    assert torch.equal(run(1), full)
    calls = count_forwards(prior)
    carried = run(2)
    assert 0 < len(calls) < steps
    assert not torch.equal(carried, run(2, concept)), "the rule acts"
    error = float((carried - full).norm() / full.norm())
    assert 0 < error < float((run(None, concept) - full).norm() / full.norm())


def test_a_sweep_whose_first_cell_is_a_pair(gcfg, prior, prompt, latent):
    """Its other cells are none, and are measured from the unconditional."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider
    from comfyui_gcfg.nodes.runtime.ksampler import sample_cells

    cells = [(GuidanceTerm(w, conditioning=prompt(1)), GuidanceTerm(-4.0, conditioning=prompt(2))) for w in (5.0, 3.0)]
    settings = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "normal"}
    guiders = [GCFGGuider(prior, prompt(0), cell, "Test") for cell in cells]
    got = sample_cells(guiders, latent, **settings)["samples"]
    expected = torch.cat([gcfg(prior, prompt(0), cell, latent, steps=2) for cell in cells])
    assert close(got, expected)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_rule_of_any_weight_under_a_hook_of_the_sampler(gcfg, put, prior, prompt, latent, weight):
    model = put(prior, NODES["RescaleCFG"])
    ruled = prior.clone()
    ruled.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 1.01)
    terms = [GuidanceTerm(weight, model=ruled, conditioning=prompt(1))]
    assert torch.isfinite(gcfg(model, prompt(0), terms, latent, steps=2)).all()


def test_equal_predictions_are_evaluated_once(gcfg, prior, concept, prompt, latent, count_forwards):
    calls, text = count_forwards(prior, concept), prompt(1)
    same = [GuidanceTerm(3.0, conditioning=text), GuidanceTerm(2.0, conditioning=text)]
    got = gcfg(prior, prompt(0), same, latent, steps=1)
    assert [rows for _, rows in calls] == [2]
    assert close(got, gcfg(prior, prompt(0), [GuidanceTerm(5.0, conditioning=text)], latent, steps=1))
    calls.clear()
    gcfg(prior, prompt(0), [GuidanceTerm(w, model=concept, conditioning=text) for w in (3.0, 2.0)], latent, steps=1)
    assert sorted(rows for _, rows in calls) == [1, 1]


@pytest.mark.parametrize("percent", [0.1, 0.2, 0.6])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_a_boundary_that_a_step_lies_on(comfy, transformer, short, steps, percent):
    """A flow model's noise levels: stock compares them as float32, so must we, or a step on a boundary is missed."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    model = transformer(0)
    sampling = model.get_model_object("model_sampling")
    levels = comfy.samplers.calculate_sigmas(sampling, "simple", steps)[:-1]
    start = sampling.percent_to_sigma(percent)
    expected = [not bool(level > start) for level in levels]  # as comfy.samplers.get_area_and_mult compares
    term = GuidanceTerm(3.0, start_percent=percent, conditioning=short(1))
    plan = GCFGGuider(model, short(0), [term], "Test").plan
    assert [bool(plan.active(float(level))) for level in levels] == expected


def test_an_unconditional_in_two_ranges(gcfg, stock, transformer, short):
    import sys

    ranged = sys.modules["nodes"].ConditioningSetTimestepRange().set_range
    image, model = {"samples": torch.zeros(1, 16, 8, 8)}, transformer(0)
    unconditional = ranged(short(2), 0.0, 0.25)[0] + ranged(short(3), 0.251, 1.0)[0]
    settings = {"steps": 4, "scheduler": "simple"}
    expected = stock(model, short(1), unconditional, image, cfg=3.0, **settings)
    got = gcfg(model, unconditional, [GuidanceTerm(3.0, conditioning=short(1))], image, **settings)
    assert torch.equal(got, expected)
