"""Several models in one run: against hand-written loops, and what is loaded, batched and restored."""

import builtins
import sys

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import relative
from comfyui_gcfg.testkit.layouts import NARROW
from comfyui_gcfg.testkit.loads import counting
from comfyui_gcfg.testkit.models import controlnet_state_dict

STEPS = 4


@pytest.fixture
def double(load_unet, weights):
    """A model evaluated by hand in float64, without ComfyUI's samplers or model management."""

    def make(seed):
        model = load_unet(weights("sd15", seed)).model
        unet = model.diffusion_model.double()
        unet.dtype = torch.float64
        sampling = model.model_sampling

        def denoise(x, sigma, tokens):
            t = sampling.timestep(torch.tensor([sigma])).double().expand(x.shape[0])
            eps = unet(x / (sigma**2 + 1) ** 0.5, t, context=tokens.double(), transformer_options={})
            return x - sigma * eps

        return denoise, sampling

    return make


def test_two_models_against_a_loop_in_float64(gcfg, prior, concept, prompt, latent, double, comfy):
    """Euler by hand: x' = x + (x - D) / sigma * (sigma' - sigma), D by Eq. 3."""
    w_control, w_concept = 4.0, 1.5
    terms = [
        GuidanceTerm(w_control, conditioning=prompt(1)),
        GuidanceTerm(w_concept, model=concept, conditioning=prompt(3)),
    ]
    got = gcfg(prior, prompt(0), terms, latent, steps=STEPS)

    (d_prior, sampling), (d_concept, _) = double(0), double(1)
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS).double()
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(1)).double()
    x = noise * float(torch.sqrt(1.0 + sigmas[0] ** 2))  # ComfyUI scales so at the largest sigma
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        base = d_prior(x, sigma, prompt(0)[0][0])
        denoised = (
            base
            + w_control * (d_prior(x, sigma, prompt(1)[0][0]) - base)
            + w_concept * (d_concept(x, sigma, prompt(3)[0][0]) - base)
        )
        x = x + (x - denoised) / sigma * (following - sigma)
    expected = x / 0.18215  # the latent format's scale
    # float32 against float64 over 4 steps of guidance: rounding of about 1e-6, amplified by weights and steps
    assert float((got.double() - expected).abs().max() / expected.abs().max()) < 1e-4
    assert not torch.allclose(got, gcfg(prior, prompt(0), terms[:1], latent, steps=STEPS), rtol=1e-2)


def test_mask_acts_on_the_delta(gcfg, prior, concept, prompt, latent, comfy):
    """One Euler step to sigma 0 returns D itself, so inside the mask it is the full sum, outside the sum without it."""
    control = GuidanceTerm(3.0, conditioning=prompt(1))
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1.0  # the right half; half-size boundaries fall between latent pixels, so no blending
    inside = gcfg(prior, prompt(0), [control, GuidanceTerm(2.0, model=concept)], latent, steps=1)
    outside = gcfg(prior, prompt(0), [control], latent, steps=1)
    masked = gcfg(prior, prompt(0), [control, GuidanceTerm(2.0, model=concept, mask=mask)], latent, steps=1)
    assert torch.allclose(masked[..., 4:], inside[..., 4:], rtol=1e-4, atol=1e-4 * float(inside.abs().max()))
    assert torch.allclose(masked[..., :4], outside[..., :4], rtol=1e-4, atol=1e-4 * float(inside.abs().max()))
    assert not torch.allclose(inside, outside, rtol=1e-2)


def test_mask_is_resized_as_comfyui_does(comfy):
    from comfyui_gcfg.gcfg.masks import fit_mask

    mask = torch.rand(1, 37, 53, generator=torch.Generator().manual_seed(0))
    conds = [{"mask": mask}]
    comfy.samplers.resolve_areas_and_cond_masks_multidim(conds, (8, 12), "cpu")
    assert torch.equal(fit_mask(mask, (3, 4, 8, 12), "Guidance Term"), conds[0]["mask"][:, None])


def test_batched_where_weights_are_the_same(gcfg, prior, concept, prompt, latent, count_forwards):
    calls = count_forwards(prior, concept)
    terms = [
        GuidanceTerm(3.0, conditioning=prompt(1)),
        GuidanceTerm(-1.0, conditioning=prompt(2)),
        GuidanceTerm(2.0, model=concept, conditioning=prompt(3)),
    ]
    gcfg(prior, prompt(0), terms, latent, steps=2)
    one_step = [(id(concept.model.diffusion_model), 1), (id(prior.model.diffusion_model), 3)]
    assert calls == one_step * 2


def test_loads_once_and_moves_nothing_between_steps(gcfg, prior, concept, prompt, latent, comfy, monkeypatch):
    management, requests = comfy.model_management, []
    request = management.load_models_gpu
    monkeypatch.setattr(
        management,
        "load_models_gpu",
        lambda models, *a, **k: (requests.append(list(models)), request(models, *a, **k))[1],
    )
    management.unload_all_models()
    terms = [GuidanceTerm(3.0, conditioning=prompt(1)), GuidanceTerm(2.0, model=concept, conditioning=prompt(3))]
    with counting([prior, concept]) as counts:
        gcfg(prior, prompt(0), terms, latent, steps=STEPS)
        assert {prior, concept} <= set(requests[-1]), "one request names every model"
        assert counts.loads == {id(prior.model): 1, id(concept.model): 1}, "each is loaded once"
        assert counts.evaluations == 2 * STEPS
        assert counts.between_steps == 0
        gcfg(prior, prompt(0), terms, latent, steps=STEPS)
        assert sum(counts.loads.values()) == 2, "a second run finds them loaded"


def test_memory_request_covers_the_hungriest_model(gcfg, prior, concept, prompt, latent, comfy, monkeypatch):
    asked = []
    original = comfy.model_management.load_models_gpu

    def load_models_gpu(models, memory_required=0, **kwargs):
        asked.append((len(list(models)), memory_required))
        return original(models, memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    monkeypatch.setattr(concept.model, "memory_required", lambda *a, **k: 7e9)
    gcfg(prior, prompt(0), [GuidanceTerm(2.0, model=concept)], latent)
    assert asked[-1][0] == 2
    assert asked[-1][1] >= 7e9


@pytest.mark.parametrize("error", ["RuntimeError", "KeyboardInterrupt", "InterruptProcessingException"])
def test_everything_is_restored_after_an_exception(
    gcfg, prior, concept, prompt, latent, load_unet, weights, comfy, error
):
    interruption = sys.modules.get("comfy.interruption", comfy.model_management)
    kind = getattr(builtins, error, None) or getattr(interruption, error)
    terms = [GuidanceTerm(3.0, conditioning=prompt(1)), GuidanceTerm(2.0, model=concept, conditioning=prompt(3))]
    expected = gcfg(prior, prompt(0), terms, latent)
    states = [{k: v.clone() for k, v in p.model.state_dict().items()} for p in (prior, concept)]
    options = [dict(p.model_options["transformer_options"]) for p in (prior, concept)]

    def fail(module, args):
        if fail.left == 0:
            raise kind
        fail.left -= 1

    fail.left = 2
    handle = concept.model.diffusion_model.register_forward_pre_hook(fail)
    with pytest.raises(kind):
        gcfg(prior, prompt(0), terms, latent)
    handle.remove()
    for patcher, state, option in zip((prior, concept), states, options, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in patcher.model.state_dict().items())
        assert patcher.model_options["transformer_options"] == option
        assert getattr(patcher.model, "current_patcher", None) is None
    assert torch.equal(gcfg(prior, prompt(0), terms, latent), expected)


def _area(cond, *area):
    return [
        [tokens, {**options, "area": area, "strength": 1.0, "set_area_to_bounds": False}] for tokens, options in cond
    ]


def _mask(cond, mask):
    return [
        [tokens, {**options, "mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False}]
        for tokens, options in cond
    ]


def test_area_and_mask_conditionings(gcfg, stock, prior, prompt):
    wide = {"samples": torch.zeros(1, 4, 8, 16)}
    half = torch.zeros(1, 8, 16)
    half[..., 8:] = 1.0
    for extra in (_area(prompt(3), 8, 8, 0, 8), _mask(prompt(3), half)):
        positive = prompt(1) + extra
        expected = stock(prior, positive, prompt(2), wide)
        assert torch.equal(gcfg(prior, prompt(2), [GuidanceTerm(7.5, conditioning=positive)], wide), expected)
        assert not torch.equal(expected, stock(prior, prompt(1), prompt(2), wide))


@pytest.fixture(scope="module")
def controlnet(comfy, tmp_path_factory):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("control") / "control.safetensors"
    save_file(controlnet_state_dict(3, NARROW), path)
    return sys.modules["comfy.controlnet"].load_controlnet(str(path))


def _controlled(nodes, net, positive, negative=None, strength=0.8):
    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(9))
    if negative is None:
        return nodes.ControlNetApply().apply_controlnet(positive, net, hint, strength)[0]
    return nodes.ControlNetApplyAdvanced().apply_controlnet(positive, negative, net, hint, strength, 0.0, 1.0)


def test_controlnet_on_both_prompts(gcfg, stock, prior, prompt, latent, controlnet):
    positive, negative = _controlled(sys.modules["nodes"], controlnet, prompt(1), prompt(2))
    expected = stock(prior, positive, negative, latent)
    assert torch.equal(gcfg(prior, negative, [GuidanceTerm(7.5, conditioning=positive)], latent), expected)
    assert not torch.equal(expected, stock(prior, prompt(1), prompt(2), latent))


def test_controlnet_of_the_plain_node_reaches_the_unconditional(
    gcfg, stock, prior, concept, prompt, latent, controlnet
):
    positive = _controlled(sys.modules["nodes"], controlnet, prompt(1))
    expected = stock(prior, positive, prompt(2), latent)
    assert torch.equal(gcfg(prior, prompt(2), [GuidanceTerm(7.5, conditioning=positive)], latent), expected)
    terms = [GuidanceTerm(0.0001, conditioning=prompt(4)), GuidanceTerm(7.5, conditioning=positive)]
    close = gcfg(prior, prompt(2), terms, latent)
    assert relative(close, expected) < 1e-2, "whichever socket it is on"


@pytest.mark.parametrize("plain", [True, False], ids=["Apply ControlNet", "advanced"])
def test_controlnet_of_a_sampler_with_gcfg_model(
    gcfg, gcfg_model, stock, prior, concept, prompt, latent, controlnet, plain
):
    """The sampler's own prompts come from its guider, and bring what hangs on them."""
    nodes, style = sys.modules["nodes"], GuidanceTerm(1.5, model=concept, conditioning=prompt(3))
    if plain:
        positive, negative = _controlled(nodes, controlnet, prompt(1)), prompt(2)
    else:
        positive, negative = _controlled(nodes, controlnet, prompt(1), prompt(2))
    got = stock(gcfg_model(prior, style), positive, negative, latent)
    assert torch.equal(got, gcfg(prior, negative, [GuidanceTerm(7.5, conditioning=positive), style], latent))
    assert not torch.equal(got, stock(gcfg_model(prior, style), prompt(1), prompt(2), latent))


@pytest.fixture(scope="module")
def boxed(comfy):
    """A CONDITIONING with a box, as GLIGEN's text box node makes it; the gates have random weights."""
    import comfy.gligen
    import comfy.model_patcher

    gates = [comfy.gligen.GatedSelfAttentionDense(NARROW, 768, 8, NARROW // 8) for _ in range(8)]
    model = comfy.gligen.Gligen(gates, comfy.gligen.PositionNet(768, 768), 768)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5
    cls = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = cls(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    box = (torch.randn(1, 768, generator=generator), 4, 4, 0, 4)

    def put(cond):
        return [[tokens, {**options, "gligen": ("position", patcher, [box])}] for tokens, options in cond]

    return put


def test_boxes_of_gligen_reach_the_unconditional(gcfg, stock, prior, prompt, latent, boxed):
    positive = boxed(prompt(1))
    expected = stock(prior, positive, prompt(2), latent)
    assert torch.equal(gcfg(prior, prompt(2), [GuidanceTerm(7.5, conditioning=positive)], latent), expected)
    assert not torch.equal(expected, stock(prior, prompt(1), prompt(2), latent))


@pytest.mark.parametrize("on", ["positive", "both", "the term of another model"])
@pytest.mark.parametrize("cfg", [7.5, 1.0])
def test_boxes_of_gligen_under_gcfg_model(gcfg, gcfg_model, stock, prior, concept, prompt, latent, boxed, on, cfg):
    """Bit-equal to stock where no term acts, and to the GCFG KSampler where one does."""
    positive = boxed(prompt(1)) if on in ("positive", "both") else prompt(1)
    negative = boxed(prompt(2)) if on == "both" else prompt(2)
    third = boxed(prompt(3)) if on == "the term of another model" else prompt(3)
    idle, term = (GuidanceTerm(weight, model=concept, conditioning=third) for weight in (0.0, 1.5))
    plain = stock(prior, positive, negative, latent, cfg=cfg)
    assert torch.equal(stock(gcfg_model(prior, idle), positive, negative, latent, cfg=cfg), plain)
    got = stock(gcfg_model(prior, term), positive, negative, latent, cfg=cfg)
    assert torch.equal(got, gcfg(prior, negative, [GuidanceTerm(cfg, conditioning=positive), term], latent))
    unboxed = GuidanceTerm(1.5, model=concept, conditioning=prompt(3))
    assert relative(stock(gcfg_model(prior, unboxed), prompt(1), prompt(2), latent, cfg=cfg), got) > 1e-2


@pytest.mark.parametrize("what", ["boxes", "ControlNet"])
def test_at_a_cfg_of_zero_the_negative_has_what_the_positive_brings(
    gcfg_model, stock, prior, prompt, latent, boxed, controlnet, what
):
    """As in stock, whose negative is all that is left there."""
    positive = boxed(prompt(1)) if what == "boxes" else _controlled(sys.modules["nodes"], controlnet, prompt(1))
    expected = stock(prior, positive, prompt(2), latent, cfg=0.0)
    assert relative(expected, stock(prior, prompt(1), prompt(2), latent, cfg=0.0)) > 1e-2
    idle = gcfg_model(prior, GuidanceTerm(0.0, conditioning=prompt(3)))
    assert relative(stock(idle, positive, prompt(2), latent, cfg=0.0), expected) < 1e-5


@pytest.mark.parametrize("what", ["boxes", "ControlNet"])
@pytest.mark.parametrize("on", ["positive", "negative"])
def test_what_the_sampler_brings_reaches_the_terms_alike_under_another_guider(
    comfy, gcfg_model, custom_advanced, prior, prompt, latent, boxed, controlnet, what, on
):
    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs)

    def brought(cond):
        return boxed(cond) if what == "boxes" else _controlled(sys.modules["nodes"], controlnet, cond)

    prompts = {"positive": prompt(1), "negative": prompt(2)}
    prompts[on] = brought(prompts[on])
    # A pair, which without the sampler's positive would take its name.
    pair = GuidanceTerm(2.0, conditioning=prompt(3)), GuidanceTerm(-1.0, conditioning=prompt(4))

    def run(kind, model):
        guider = kind(model)
        guider.set_conds(prompts["positive"], prompts["negative"])
        guider.set_cfg(3.0)
        return custom_advanced(guider, latent, 3)["samples"]

    for terms in (pair[:1], pair):
        model = gcfg_model(prior, *terms)
        assert relative(run(Other, model), run(comfy.samplers.CFGGuider, model)) < 2e-5


@pytest.mark.parametrize("what", ["boxes", "ControlNet"])
@pytest.mark.parametrize("way", ["stock", "another guider", "Basic Guider"])
def test_what_a_term_brings_is_not_the_samplers(
    comfy, extra, gcfg_model, custom_advanced, prior, prompt, latent, boxed, controlnet, what, way
):
    """By hand: the sampler's own prompts predict what they do without the term."""

    def brought(cond):
        return boxed(cond) if what == "boxes" else _controlled(sys.modules["nodes"], controlnet, cond)

    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs)

    def one_step(model, positive, negative=None, cfg=1.0, kind=comfy.samplers.CFGGuider):
        guider = extra("nodes_custom_sampler").Guider_Basic(model) if way == "Basic Guider" else kind(model)
        guider.set_conds(*([positive] if way == "Basic Guider" else [positive, negative or positive]))
        guider.set_cfg(cfg)
        return custom_advanced(guider, latent, 1)["samples"]

    term = GuidanceTerm(2.0, conditioning=brought(prompt(3)))
    kind = Other if way == "another guider" else comfy.samplers.CFGGuider
    got = one_step(gcfg_model(prior, term), prompt(1), prompt(2), 4.0, kind)
    pulled = one_step(prior, brought(prompt(3)))
    positive, negative = one_step(prior, prompt(1)), one_step(prior, prompt(2))
    expected = negative + 4.0 * (positive - negative) + 2.0 * (pulled - negative)
    if way == "Basic Guider":
        expected = positive + 2.0 * (pulled - positive)
    assert relative(got, expected) < 1e-5
    assert relative(pulled, one_step(prior, prompt(3))) > 1e-2


def test_controlnet_on_another_models_term_changes_only_that_term(gcfg, prior, concept, prompt, latent, controlnet):
    """Against the sum of one-step predictions: D = D0 + w (C - D0), with C from the stock sampler at cfg 1."""
    positive = _controlled(sys.modules["nodes"], controlnet, prompt(1), prompt(1))[0]
    stock = sys.modules["nodes"].common_ksampler

    def one_step(model, cond):
        return stock(model, 1, 1, 1.0, "euler", "normal", cond, cond, latent)[0]["samples"]

    base, control = one_step(prior, prompt(2)), one_step(concept, positive)
    got = gcfg(prior, prompt(2), [GuidanceTerm(2.5, model=concept, conditioning=positive)], latent, steps=1)
    expected = base + 2.5 * (control - base)
    assert relative(got, expected) < 1e-5
    assert not torch.equal(control, one_step(concept, prompt(1)))


def test_replaced_batch_function_gets_pairs(gcfg, prior, prompt, latent, comfy):
    """A `sampler_calc_cond_batch_function` knows two conditionings, so it never sees more."""
    sizes = []

    def calc(args):
        sizes.append(len(args["conds"]))
        return comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    clone = prior.clone()
    clone.model_options["sampler_calc_cond_batch_function"] = calc
    terms = [GuidanceTerm(3.0, conditioning=prompt(i)) for i in (1, 2, 3)]
    got, expected = gcfg(clone, prompt(0), terms, latent), gcfg(prior, prompt(0), terms, latent)
    assert set(sizes) == {2}
    assert relative(got, expected) < 2e-5, "batches of other sizes round differently"


def test_other_models_options_stay_their_own(gcfg, prior, concept, prompt, latent):
    """A patch on one term's clone acts on that term and on nothing else."""
    zero = prior.clone()
    zero.set_model_attn2_patch(lambda n, k, v, extra: (n, torch.zeros_like(k), torch.zeros_like(v)))
    terms = [GuidanceTerm(3.0, conditioning=prompt(1)), GuidanceTerm(2.0, model=zero, conditioning=prompt(3))]
    got = gcfg(prior, prompt(0), terms, latent)
    other = [terms[0], GuidanceTerm(2.0, model=zero, conditioning=prompt(4))]
    assert torch.equal(got, gcfg(prior, prompt(0), other, latent)), "its text no longer matters"
    third = [GuidanceTerm(3.0, conditioning=prompt(5)), terms[1]]
    assert not torch.equal(got, gcfg(prior, prompt(0), third, latent)), "the other term's text does"


def test_term_outside_its_conditionings_range_is_left_out(gcfg, prior, prompt, latent):
    ranged = sys.modules["nodes"].ConditioningSetTimestepRange().set_range(prompt(3), 0.0, 0.5)[0]
    first = GuidanceTerm(3.0, conditioning=prompt(1))
    got = gcfg(prior, prompt(0), [first, GuidanceTerm(2.0, conditioning=ranged)], latent)
    expected = gcfg(prior, prompt(0), [first, GuidanceTerm(2.0, end_percent=0.5, conditioning=prompt(3))], latent)
    assert torch.equal(got, expected)


def test_a_term_of_negative_weight_is_encoded_as_a_negative_prompt(gcfg, stock, prior, prompt, latent, monkeypatch):
    """The SDXL refiner reads another aesthetic score there; stock says so of the conditioning named negative."""
    seen = {}
    encode = prior.model.extra_conds

    def extra_conds(**kwargs):
        seen[float(kwargs["cross_attn"][0, 0, 0])] = kwargs["prompt_type"]
        return encode(**kwargs)

    monkeypatch.setattr(prior.model, "extra_conds", extra_conds)
    first = {seed: float(prompt(seed)[0][0][0, 0, 0]) for seed in range(4)}
    stock(prior, prompt(1), prompt(2), latent, steps=1)
    assert (seen[first[1]], seen[first[2]]) == ("positive", "negative")
    seen.clear()
    pair = [GuidanceTerm(5.0, conditioning=prompt(1)), GuidanceTerm(-4.0, conditioning=prompt(2))]
    gcfg(prior, prompt(0), pair, latent, steps=1)
    assert (seen[first[1]], seen[first[2]]) == ("positive", "negative")
    gcfg(prior, prompt(0), [*pair, GuidanceTerm(3.0, conditioning=prompt(3))], latent, steps=1)
    assert seen[first[2]] == "negative"
    assert seen[first[3]] != "negative"
