"""Terms that are measured from a prediction of their own: sums by hand in float64, and stock guiders."""

import inspect

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.guidance_cache import CacheRule
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.nodes.guidance import GCFGGuidanceTerm
from comfyui_gcfg.testkit import checks
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

OFFSETS = {"prior": 0.0, "lora": 0.7, "other": -0.4}
REORDERED = 2e-5  # the same calls combined in another order of float32 operations
SIGMA = 3.0


@pytest.fixture
def models(exact, prior, concept):
    """Models whose prediction is elementwise: "prior" is the sampler's, "lora" shares its weights."""
    of = {"prior": prior, "lora": prior, "other": concept}
    return {name: exact(of[name], name, offset) for name, offset in OFFSETS.items()}


@pytest.fixture
def term(models, prompt):
    """A term by the names of its models and the numbers of its prompts; prompt 0 is the sampler's unconditional."""
    prompts = [prompt(number) for number in range(4)]

    def make(weight, model=None, cond=None, relative_model=None, relative_cond=None, **more):
        return GuidanceTerm(
            weight,
            model=models.get(model),
            conditioning=None if cond is None else prompts[cond],
            relative_model=models.get(relative_model),
            relative_conditioning=None if relative_cond is None else prompts[relative_cond],
            **more,
        )

    make.prompts = prompts
    return make


@pytest.fixture
def at_one_level(comfy, models, term):
    """The guided prediction of these terms at `SIGMA`, and the noisy latent: one Euler step to 0 leads there."""
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    def run(terms, **options):
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        guider = GCFGGuider(models["prior"], term.prompts[0], terms, "GCFG Guider", **options)
        euler = comfy.samplers.sampler_object("euler")
        out = guider.sample(noise, torch.zeros_like(noise), euler, torch.tensor([SIGMA, 0.0]), disable_pbar=True)
        return models["prior"].get_model_object("latent_format").process_in(out).double(), noise.double() * SIGMA

    return run


def by_hand(prompts, meant, x):
    """D_0 + sum_i w_i (D_i - R_i) of (weight, (model, prompt), (model, prompt) or None for the base)."""

    def predicted(model, cond):
        variance = 0.09 + SIGMA**2
        centre = torch.tanh(x / variance) + OFFSETS[model] + prompts[cond][0][0].double()[:, :1, :1, None]
        return (centre * SIGMA**2 + x * 0.09) / variance

    base = predicted("prior", 0)
    return base + sum(w * (predicted(*own) - (base if r is None else predicted(*r))) for w, own, r in meant)


def meant_by(weight, model, cond, relative_model, relative_cond):
    """What the inputs of a Guidance Term say, each by its own sentence of the documentation."""
    own = (model or "prior", cond or 0)
    reference = {
        (False, False): None,
        (False, True): (own[0], relative_cond),  # the term's own model with it
        (True, False): (relative_model, own[1]),  # that model with the term's conditioning
        (True, True): (relative_model, relative_cond),
    }[relative_model is not None, relative_cond is not None]
    return weight, own, None if reference == ("prior", 0) else reference


models_or_none, prompts_or_none = st.sampled_from([None, "lora", "other"]), st.sampled_from([None, 1, 2])
weights = st.sampled_from([-2.5, -1.0, 0.25, 0.5, 1.0, 2.0, 7.5])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(weights, models_or_none, prompts_or_none, models_or_none, st.sampled_from([None, 0, 1, 2, 3])),
        min_size=1,
        max_size=4,
    )
)
@example([(7.5, None, 1, None, None), (2.0, None, 1, "other", None)])  # CFG and AutoGuidance
@example([(0.5, "lora", None, None, None), (0.5, "other", None, None, None), (3.0, "lora", 1, None, 0)])
@example([(1.5, None, None, None, 1)])  # away from a prompt
def test_any_sum_is_what_the_equation_says(at_one_level, term, calls, inputs):
    """Every prediction is evaluated once, however many terms share it, and the unconditional where it counts."""
    inputs = [given for given in inputs if meant_by(*given)[1] != (meant_by(*given)[2] or ("prior", 0))]
    meant = [meant_by(*given) for given in inputs]
    if not meant:
        return
    calls.clear()
    got, x = at_one_level([term(*given) for given in inputs])
    torch.testing.assert_close(got, by_hand(term.prompts, meant, x), rtol=0, atol=3e-5 * sum(abs(w) for w, *_ in meant))
    needed = {own for _, own, _ in meant} | {r for _, _, r in meant if r is not None}
    if abs(sum(w for w, _, r in meant if r is None) - 1.0) > 1e-9:
        needed.add(("prior", 0))
    assert sum(batch for _, batch in calls) == 2 * len(needed)


@pytest.mark.parametrize(
    ("inputs", "count"),
    [
        pytest.param([(7.5, None, 1), (2.0, None, 1, "other")], 3, id="CFG and AutoGuidance"),
        pytest.param([(1.5, None, 2), (7.0, None, 1, None, 2)], 3, id="InstructPix2Pix"),
        pytest.param([(1.5, None, 2), (9.0, None, 1, None, 2)], 3, id="Dual CFG Guider, nested"),
        pytest.param([(1.0, None, 1), (3.0, None, 1, "other", 2)], 2, id="Dual Model CFG Guider"),
        pytest.param(
            [(w, m, *of) for m in ("lora", "other") for w, of in ((0.5, (0,)), (3.75, (1, None, 0)))],
            4,
            id="Composite of two LoRAs",
        ),
        pytest.param(
            [(1 / 3, m, 0) for m in ("prior", "lora", "other")] + [(2.5, m, 1, None, 0) for m in ("lora", "other")],
            5,
            id="Composite of LoRAs with their own unconditionals",
        ),
    ],
)
def test_known_guidances_take_the_least_evaluations(at_one_level, term, calls, inputs, count):
    at_one_level([term(*given) for given in inputs])
    assert sum(batch for _, batch in calls) == 2 * count


@pytest.fixture
def custom(custom_advanced, latent):
    """SamplerCustomAdvanced's run of any guider."""
    return lambda guider: custom_advanced(guider, latent, 4)["samples"]


def ours(model, unconditional, *terms):
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider

    return GCFGGuider(model, unconditional, terms, "GCFG Guider")


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_guider_is_a_term_and_a_relative_one(extra, custom, prior, prompt, style):
    positive, middle, negative = prompt(1), prompt(2), prompt(3)
    stock = extra("nodes_custom_sampler").Guider_DualCFG(prior)
    stock.set_conds(positive, middle, negative)
    if style == "nested" and "nested" not in inspect.signature(stock.set_cfg).parameters:
        pytest.skip("this ComfyUI's Dual CFG Guider has no style")
    stock.set_cfg(6.0, 1.5, *([True] if style == "nested" else []))
    weight = 6.0 * (1.5 if style == "nested" else 1.0)
    relative = GuidanceTerm(weight, conditioning=positive, relative_conditioning=middle)
    got = custom(ours(prior, negative, GuidanceTerm(1.5, conditioning=middle), relative))
    assert checks.relative(got, custom(stock)) < REORDERED


def test_dual_model_guider_is_a_term_relative_to_the_other_model(extra, custom, prior, concept, prompt):
    dual = getattr(extra("nodes_custom_sampler"), "Guider_DualModel", None)
    if dual is None:
        pytest.skip("this ComfyUI has no Dual Model CFG Guider")
    stock = dual(prior, concept)
    stock.set_conds(prompt(1), prompt(2))
    stock.set_cfg(4.0)
    own = GuidanceTerm(1.0, conditioning=prompt(1))
    relative = GuidanceTerm(3.0, conditioning=prompt(1), relative_model=concept, relative_conditioning=prompt(2))
    assert checks.relative(custom(ours(prior, prompt(3), own, relative)), custom(stock)) < REORDERED


def related(term, *relation):
    from comfyui_gcfg.nodes.relation import GCFGGuidanceRelation

    (((made,)),) = GCFGGuidanceRelation().make((term,), *relation)
    return made


@pytest.mark.parametrize("against", ["text", ""])
def test_perp_neg_is_a_negative_term_perpendicular_to_the_positive_one(extra, custom, prior, prompt, against):
    guider = getattr(extra("nodes_perpneg"), "Guider_PerpNeg", None)
    if guider is None:
        pytest.skip("this ComfyUI has no Perp-Neg Guider")
    stock = guider(prior)
    stock.set_conds(prompt(1), prompt(2), prompt(3))
    stock.set_cfg(5.0, 0.8)
    positive = GuidanceTerm(5.0, conditioning=prompt(1), label="text")
    negative = GuidanceTerm(-5.0 * 0.8, conditioning=prompt(2), label="not")
    expected = custom(stock)
    got = custom(ours(prior, prompt(3), positive, related(negative, "perpendicular", against, 1.0)))
    assert checks.relative(got, expected) < 10 * REORDERED
    assert checks.relative(custom(ours(prior, prompt(3), positive, negative)), expected) > 1e-2


def test_relations_of_several_terms_are_what_the_loop_says(at_one_level, term):
    """Masked, relative, on other models; each looks at the others as they were evaluated."""
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1.0
    a = term(4.0, None, 1, label="a")
    b = related(term(-3.0, "lora", 2, label="b", mask=mask), "perpendicular", "a", 1.0)
    c = related(term(9.0, "other", 1, None, 3, label="c"), "limit", "", 0.5)
    got, x = at_one_level([a, b, c])
    zero = by_hand(term.prompts, [], x)

    def weighted(*meant):
        return by_hand(term.prompts, [meant], x) - zero

    g_a, g_c = weighted(4.0, ("prior", 1), None), weighted(9.0, ("other", 1), ("other", 3))
    g_b = weighted(-3.0, ("lora", 2), None) * torch.nn.functional.interpolate(mask[None], size=(8, 8))[0].double()
    expected = zero + g_a
    for k in range(len(x)):
        along = (g_b[k] * g_a[k]).sum() / g_a[k].square().sum()
        rest = g_a[k] + g_b[k]
        expected[k] += g_b[k] - along * g_a[k] + g_c[k] * min(1.0, 0.5 * rest.norm() / g_c[k].norm())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_a_relation_rests_where_the_other_does_not_act(gcfg, prior, concept, prompt, latent):
    early = GuidanceTerm(3.0, 0.0, 0.0, conditioning=prompt(1), label="early")
    late = GuidanceTerm(-2.0, model=concept, conditioning=prompt(2))
    got = gcfg(prior, prompt(0), [early, related(late, "limit", "early", 0.0)], latent)
    assert checks.relative(got, gcfg(prior, prompt(0), [early, late], latent)) < REORDERED


def test_a_pair_with_a_relation_is_no_pair(gcfg, prior, prompt, latent, count_forwards):
    """The unconditional is what both are measured from, so it is evaluated."""
    calls = count_forwards(prior)
    positive = GuidanceTerm(5.0, conditioning=prompt(1), label="text")
    negative = GuidanceTerm(-4.0, conditioning=prompt(2))
    gcfg(prior, prompt(0), [positive, related(negative, "perpendicular", "text", 1.0)], latent, steps=1)
    assert sum(batch for _, batch in calls) == 3


def test_perp_neg_is_made_of_terms_around_the_empty_prompt(extra, custom, prior, prompt):
    """Its parts: the positive and the negative are both measured from the empty prompt, whatever the sampler's is."""
    guider = getattr(extra("nodes_perpneg"), "Guider_PerpNeg", None)
    if guider is None:
        pytest.skip("this ComfyUI has no Perp-Neg Guider")
    positive, negative, empty = prompt(1), prompt(2), prompt(3)
    stock = guider(prior)
    stock.set_conds(positive, negative, empty)
    stock.set_cfg(5.0, 0.0)  # its third part, the projected negative, is no sum
    own = GuidanceTerm(1.0, conditioning=empty)
    relative = GuidanceTerm(5.0, conditioning=positive, relative_conditioning=empty)
    assert checks.relative(custom(ours(prior, negative, own, relative)), custom(stock)) < REORDERED


def test_a_guidance_node_on_a_terms_model_sees_what_the_term_is_measured_from(
    extra, gcfg, stock, prior, concept, prompt, latent, count_forwards
):
    """RescaleCFG on the term's model: the sum is stock's KSampler on that model, with its own negative prompt."""
    node = extra("nodes_model_advanced").RescaleCFG
    rescaled = node().patch(concept, 0.7)[0] if hasattr(node(), "patch") else node.execute(concept, 0.7).result[0]
    expected = stock(rescaled, prompt(1), prompt(2), latent, cfg=6.0)
    negative = prompt(2)
    own = GuidanceTerm(1.0, model=concept, conditioning=negative)
    relative = GuidanceTerm(6.0, model=rescaled, conditioning=prompt(1), relative_conditioning=negative)
    calls = count_forwards(prior, concept)
    got = gcfg(prior, prompt(3), [own, relative], latent)
    assert sum(batch for _, batch in calls) == 2 * 4, "the sampler's unconditional has no part in it"
    assert checks.relative(got, expected) < 10 * REORDERED
    plain = stock(concept, prompt(1), prompt(2), latent, cfg=6.0)
    assert checks.relative(got, plain) > 1e-2


def test_a_guidance_node_on_the_samplers_model_sees_the_weight_of_what_is_measured_from_the_base(
    at_one_level, term, models
):
    """A relative term changes the conditional prediction that such a node sees, and not its scale."""
    seen = {}

    def combination(args):
        seen.update(args)
        return args["input"] - (
            args["uncond_denoised"] + args["cond_scale"] * (args["cond_denoised"] - args["uncond_denoised"])
        )

    plain, _ = at_one_level([term(4.0, None, 1), term(2.0, None, 1, "other")])
    models["prior"].set_model_sampler_cfg_function(combination)
    hooked, _ = at_one_level([term(4.0, None, 1), term(2.0, None, 1, "other")])
    assert seen["cond_scale"] == 4.0
    torch.testing.assert_close(hooked, plain, rtol=0, atol=1e-4)


def test_a_mask_cuts_the_pull_of_a_relative_term(at_one_level, term):
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1.0
    terms = [term(4.0, None, 1), term(2.0, "lora", 1, None, 2)]
    with_it, without = (at_one_level(chosen)[0] for chosen in (terms, terms[:1]))
    halves, _ = at_one_level([terms[0], term(2.0, "lora", 1, None, 2, mask=mask)])
    assert torch.equal(halves[..., :4], without[..., :4])
    assert torch.equal(halves[..., 4:], with_it[..., 4:])


def test_one_that_is_measured_from_the_unconditional_itself_is_an_ordinary_term(gcfg, stock, prior, prompt, latent):
    negative = prompt(2)
    term = GuidanceTerm(7.5, conditioning=prompt(1), relative_conditioning=negative)
    assert torch.equal(gcfg(prior, negative, [term], latent), stock(prior, prompt(1), negative, latent))


def test_the_cache_leaves_a_relative_term_and_its_reference_out_together(gcfg, models, term, latent, calls):
    rule = CacheRule(every=2, linear=False)
    terms = [term(4.0, None, 1), term(2.0, "lora", 2, None, 3, cache_rule=rule)]
    gcfg(models["prior"], term.prompts[0], terms, latent)
    assert [name for name, _ in calls].count("lora") == 2  # one call of two, at the steps 1 and 3
    calls.clear()
    always = gcfg(models["prior"], term.prompts[0], [terms[0], term(2.0, "lora", 2, None, 3)], latent)
    each = gcfg(
        models["prior"],
        term.prompts[0],
        [terms[0], term(2.0, "lora", 2, None, 3, cache_rule=CacheRule(every=1))],
        latent,
    )
    assert checks.relative(each, always) < REORDERED


def test_the_cache_of_a_relative_term_leaves_it_the_prediction_of_another(gcfg, models, term, latent, calls):
    """Their deltas are not the same, so one of them may be carried on."""
    terms = [term(0.5, None, 1), term(3.0, None, 1, None, 2, cache_rule=CacheRule(every=1)), term(4.0, "lora", 1)]
    gcfg(models["prior"], term.prompts[0], terms, latent, steps=1)
    assert sum(batch for _, batch in calls) == 4


@pytest.mark.parametrize("linear", [True, False])
def test_the_cache_carries_on_a_term_that_pushes_away_from_its_reference(gcfg, models, term, latent, linear):
    """It predicts the unconditional itself, which is not mistaken for what its delta was carried on to."""

    def run(away):
        return gcfg(models["prior"], term.prompts[0], [term(7.5, None, 1, cache_rule=rule), away], latent, steps=6)

    rule = CacheRule(every=2, linear=linear)
    away = run(term(1.5, None, None, None, 3, cache_rule=rule))
    assert checks.relative(away, run(term(-1.5, None, 3, cache_rule=rule))) < REORDERED


def test_the_cache_measures_from_the_unconditional_where_it_is_evaluated_anyhow():
    from comfyui_gcfg.gcfg.guidance_cache import DeltaCache, Member
    from comfyui_gcfg.gcfg.steps import Steps

    rule = CacheRule(every=1, linear=False, align=-1.0)
    cache = DeltaCache(Steps([8.0, 4.0, 2.0, 1.0, 0.0]))
    text, away = Member("text", 5.0, rule), Member("base", 1.5, rule, reference="other")
    for sigma in (8.0, 4.0, 2.0, 1.0):
        wanted = cache.wanted("base", [text, away], sigma)
        predictions = {key: torch.full((1, 1, 2, 2), sigma + len(key)) for key in wanted}
        found = cache.complete(predictions)
        assert found["base", None][0] is predictions["base"]


def test_a_patch_that_reads_the_index_sees_a_term_as_such_where_it_is_a_reference_too(gcfg, prior, prompt, latent):
    seen = set()

    def patch(q, k, v, extra_options):
        seen.update(zip(extra_options["cond_or_uncond"], k[:, 0, 0].tolist(), strict=True))
        return q, k, v

    adapted = prior.clone()
    adapted.set_model_attn2_patch(patch)
    prompts = [prompt(number) for number in range(4)]
    terms = [
        GuidanceTerm(4.0, conditioning=prompts[1]),
        GuidanceTerm(3.0, conditioning=prompts[2], relative_conditioning=prompts[1]),
        GuidanceTerm(2.0, conditioning=prompts[2], relative_conditioning=prompts[3]),
    ]
    gcfg(adapted, prompts[0], terms, latent, steps=1)
    first = [float(one[0][0][0, 0, 0]) for one in prompts]
    assert {(0, first[1]), (0, first[2]), (1, first[0]), (1, first[1]), (1, first[3])} == seen


def test_a_replaced_evaluation_is_asked_for_every_prediction_once(comfy, gcfg, prior, prompt, latent):
    """Where calls cannot be batched: a term that is a reference too, and references that are shared."""
    asked = []

    def calc(args):
        asked.append(sum(cond is not None for cond in args["conds"]))
        return comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], {})

    replaced = prior.clone()
    replaced.model_options["sampler_calc_cond_batch_function"] = calc
    prompts = [prompt(number) for number in range(4)]
    terms = [
        GuidanceTerm(4.0, conditioning=prompts[1], relative_conditioning=prompts[3]),
        GuidanceTerm(3.0, conditioning=prompts[2], relative_conditioning=prompts[1]),
        GuidanceTerm(2.0, conditioning=prompts[2], relative_conditioning=prompts[3]),
    ]
    got = gcfg(replaced, prompts[0], terms, latent, steps=1)
    assert sum(asked) == 4
    assert checks.relative(got, gcfg(prior, prompts[0], terms, latent, steps=1)) < REORDERED


def test_a_patch_that_reads_the_index_sees_the_reference_as_the_unconditional(gcfg, concept, prior, prompt, latent):
    """IPAdapter and the like give the unconditional, index 1, another image than the conditional, index 0."""
    seen = []

    def patch(q, k, v, extra_options):
        seen.append(tuple(extra_options["cond_or_uncond"]))
        return q, k, v

    adapted = concept.clone()
    adapted.set_model_attn1_patch(patch)
    term = GuidanceTerm(4.0, model=adapted, conditioning=prompt(1), relative_conditioning=prompt(2))
    gcfg(prior, prompt(0), [term, GuidanceTerm(3.0, conditioning=prompt(1))], latent, steps=1)
    assert set(seen) == {(1, 0)}


def test_the_report_says_what_each_term_is_relative_to(at_one_level, term):
    from comfyui_gcfg.nodes.runtime.live import Watch

    watch = Watch(wanted=True)
    terms = [
        term(4.0, None, 1, label="text"),
        term(2.0, "lora", 1, None, 2),
        term(1.5, None, 3, None, 1),
        term(1.5, "lora", 1, "other"),
        term(1.5, "lora", 1, "other", 2),
    ]
    _, x = at_one_level(terms, watch=watch)
    said = ("", "relative_conditioning", "text", "relative_model", "relative_model and relative_conditioning")
    assert watch.report.relative == said
    (reading,) = watch.report.readings
    base = by_hand(term.prompts, [], x)
    pull = 2.0 * (by_hand(term.prompts, [(1.0, ("lora", 1), ("lora", 2))], x) - base)
    per_sample = pull.flatten(1).norm(dim=1) / (x - base).flatten(1).norm(dim=1)
    assert reading.pulls[1] == pytest.approx(float(per_sample.mean()), rel=1e-4)
    assert watch.report.as_dict()["relative"] == list(said)


def test_the_report_has_the_weight_of_a_term_with_a_relation(at_one_level, term):
    from comfyui_gcfg.nodes.runtime.live import Watch

    watch, mask = Watch(wanted=True), torch.zeros(1, 64, 64)
    mask[..., 32:] = 1.0
    terms = [term(4.0, None, 1, label="text"), related(term(-3.0, None, 2, mask=mask), "limit", "text", 0.05)]
    at_one_level(terms, watch=watch)
    (reading,) = watch.report.readings
    assert reading.weights == (4.0, -3.0)
    assert reading.pulls[1] == pytest.approx(0.05 * reading.pulls[0], rel=1e-4)


@pytest.mark.parametrize("others", [[], [(4.0, None, 2)]])
def test_the_report_of_a_term_that_predicts_the_unconditional_itself(at_one_level, term, others):
    """One that pushes away from its reference is measured, as all are, over the unconditional."""
    from comfyui_gcfg.nodes.runtime.live import Watch

    watch = Watch(wanted=True)
    _, x = at_one_level([term(1.5, None, None, None, 1), *(term(*given) for given in others)], watch=watch)
    (reading,) = watch.report.readings
    base = by_hand(term.prompts, [], x)
    pull = by_hand(term.prompts, [(1.5, ("prior", 0), ("prior", 1))], x) - base
    per_sample = pull.flatten(1).norm(dim=1) / (x - base).flatten(1).norm(dim=1)
    assert reading.centre == ""
    assert reading.pulls[0] == pytest.approx(float(per_sample.mean()), rel=1e-4)


class TestBadInput:
    def test_what_predicts_the_same(self, models, term):
        with pytest.raises(
            GuidanceError,
            match=r"^Guidance Term 'style': relative_model and relative_conditioning predict "
            r"what the term itself predicts, so it changes nothing, expected another model or prompt; "
            r"connect another one, or the prompt to conditioning\.$",
        ):
            ours(models["prior"], term.prompts[0], term(2.0, "lora", 1, "lora", 1, label="style"))

    def test_another_family(self, load_unet, weights, models, term):
        sdxl = load_unet(weights("sdxl", 0))
        wrong = GuidanceTerm(2.0, conditioning=term.prompts[1], relative_model=sdxl)
        with pytest.raises(
            GuidanceError, match=r"^Guidance Term '1': relative_model: latent format is SDXL, expected SD15"
        ):
            ours(models["prior"], term.prompts[0], wrong)

    def test_another_width(self, models, term, prompt):
        wrong = GuidanceTerm(2.0, conditioning=term.prompts[1], relative_conditioning=prompt(1, width=2048))
        with pytest.raises(
            GuidanceError, match=r"^Guidance Term '1': relative_conditioning is 2048 wide, expected 768"
        ):
            ours(models["prior"], term.prompts[0], wrong)

    def test_a_relation_to_no_term(self, models, term):
        wrong = related(term(2.0, "lora", 1, label="b"), "limit", "c", 1.0)
        message = (
            r"^Guidance Relation: against is 'c', and no connected term has that label, expected exactly one of 'a'"
        )
        with pytest.raises(GuidanceError, match=message):
            ours(models["prior"], term.prompts[0], term(1.0, None, 1, label="a"), wrong)

    def test_a_relation_to_itself(self, models, term):
        wrong = related(term(2.0, "lora", 1, label="b"), "limit", "b", 1.0)
        with pytest.raises(GuidanceError, match=r"^Guidance Relation: against is 'b', the label of the term that has"):
            ours(models["prior"], term.prompts[0], wrong)

    @pytest.mark.parametrize(("name", "value"), [("relative_model", "a text"), ("relative_conditioning", 3)])
    def test_what_is_no_model_or_prompt(self, name, value):
        with pytest.raises(GuidanceError, match=rf"^Guidance Term: {name} is .*, expected a (model|prompt); connect"):
            GCFGGuidanceTerm().make(2.0, 0.0, 1.0, **{name: value})


def test_many_evaluations_are_said(caplog, at_one_level, prompt):
    terms = [
        GuidanceTerm(0.1, conditioning=prompt(10 + number), relative_conditioning=prompt(30 + number))
        for number in range(8)
    ]
    at_one_level(terms)
    assert "17 predictions at each step" in caplog.text


def test_the_node_makes_the_term(models, term):
    ((made,),) = GCFGGuidanceTerm().make(
        2.0, 0.0, 1.0, relative_model=models["other"], relative_conditioning=term.prompts[1]
    )
    assert made.relative
    assert made.relative_model is models["other"]
    assert made.relative_conditioning is term.prompts[1]
    assert list(GCFGGuidanceTerm.INPUT_TYPES()["optional"])[-2:] == ["relative_model", "relative_conditioning"]
