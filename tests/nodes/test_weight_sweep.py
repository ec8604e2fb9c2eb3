"""Weight Sweep: every cell is the GCFG KSampler's run with its weights."""

import builtins
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from comfyui_gcfg.gcfg.curves import WeightCurve
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal
from comfyui_gcfg.testkit.models import vae_state_dict


class Greys:
    """A VAE whose pictures are flat: the first value of each latent as a grey."""

    def decode(self, samples):
        return samples[:, 0, 0, 0].float().sigmoid()[:, None, None, None].expand(-1, 24, 16, 3)


@pytest.fixture
def sweep(comfy):
    """The three outputs of the node; widgets by name."""
    from comfyui_gcfg.nodes.weight_sweep import GCFGWeightSweep

    def run(model, unconditional, terms, latent, weights_1="0, 3", weights_2="1.5, -1", **widgets):
        values = {"seed": 1, "steps": 4, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
        values |= {"label_1": "a", "label_2": "b", "vae": Greys(), **widgets}
        return GCFGWeightSweep().sweep(
            model,
            unconditional=unconditional,
            latent_image=latent,
            weights_1=weights_1,
            weights_2=weights_2,
            term_1=tuple(terms),
            **values,
        )

    return run


@pytest.fixture
def terms(exact, concept, prompt):
    """Term a on the sampler's own model, b on another."""
    other = exact(concept, "concept", 1.0)
    return [GuidanceTerm(1.0, conditioning=prompt(1), label="a"), GuidanceTerm(1.0, model=other, label="b")]


@pytest.fixture
def pair():
    """An empty batch of two."""
    return {"samples": torch.zeros(2, 4, 8, 8)}


def each_cell(terms, weights_1=(0.0, 3.0), weights_2=(1.5, -1.0)):
    """The terms of each cell, row by row, written out."""
    for second in weights_2:
        for first in weights_1:
            weights = {"a": first, "b": second}
            yield [replace(term, weight=weights.get(term.label, term.weight)) for term in terms]


@pytest.fixture
def alone(gcfg):
    """The GCFG KSampler's latents with the weights of each cell, in a row."""

    def run(model, unconditional, cells, latent, **widgets):
        widgets = {"steps": 4, "scheduler": "karras", **widgets}
        return torch.cat([gcfg(model, unconditional, cell, latent, **widgets) for cell in cells])

    return run


def test_every_sampler(sweep, alone, base, terms, prompt, pair, comfy):
    """All that this ComfyUI offers: solvers that draw noise, evaluate twice, or choose their own steps."""
    names = list(comfy.samplers.KSampler.SAMPLERS)
    assert {"euler_ancestral", "heun", "dpm_adaptive", "dpmpp_3m_sde", "ddpm", "lcm", "uni_pc"} <= set(names)
    results = set()
    for name in names:
        got = sweep(base, prompt(0), terms, pair, sampler_name=name)[2]["samples"]
        expected = alone(base, prompt(0), each_cell(terms), pair, sampler=name)
        assert torch.isfinite(got).all(), name
        assert torch.equal(got, expected), name
        assert len(got[:, 0, 0, 0].unique()) == 8, f"{name}: four cells of two latents, all different"
        results.add(tuple(got[:, 0, 0, 0].tolist()))
    assert len(results) > len(names) / 2, "the solvers differ"


def rescale(args):
    """A `sampler_cfg_function` that looks at a whole prediction, as RescaleCFG does."""
    cond, uncond, scale = args["cond"], args["uncond"], args["cond_scale"]
    guided = uncond + scale * (cond - uncond)
    return 0.3 * guided * cond.std() / guided.std() + 0.7 * guided


def again(args):
    """A post-cfg hook that evaluates the model again."""
    import comfy.samplers

    (other,) = comfy.samplers.calc_cond_batch(
        args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
    )
    return args["denoised"] + 0.5 * (args["cond_denoised"] - 0.9 * other)


def half_mask():
    mask = torch.zeros(2, 64, 64)
    mask[0, :, 32:] = 1.0
    mask[1, :24] = 0.5
    return mask


def hooked(setter, hook):
    def change(model, terms):
        getattr(model, setter)(hook)
        return model, terms

    return change


def with_term_a(**changes):
    return lambda model, terms: (model, [replace(terms[0], **changes), *terms[1:]])


def ranged(model, terms):
    node = sys.modules["nodes"].ConditioningSetTimestepRange()
    return model, [replace(terms[0], conditioning=node.set_range(terms[0].conditioning, 0.0, 0.5)[0]), terms[1]]


def extra_terms(model, terms):
    return model, [GuidanceTerm(0.5, conditioning=terms[0].conditioning), *terms]


RUNS = {
    "rescale": hooked("set_model_sampler_cfg_function", rescale),
    "hook that evaluates": hooked("set_model_sampler_post_cfg_function", again),
    "interval": with_term_a(start_percent=0.3, end_percent=0.8),
    "curve": with_term_a(curve=WeightCurve("cosine", -2.0)),
    "curve in an interval": with_term_a(curve=WeightCurve("linear", 5.0), end_percent=0.6),
    "mask": with_term_a(mask=half_mask()),
    "range of the conditioning": ranged,
    "a term that is not swept": extra_terms,
}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpm_2_ancestral"])
@pytest.mark.parametrize("change", RUNS)
def test_terms_and_hooks_act_in_each_cell_as_alone(sweep, alone, base, terms, prompt, pair, change, sampler):
    plain = alone(base, prompt(0), each_cell(terms), pair, sampler=sampler)
    model, terms = RUNS[change](base, terms)
    got = sweep(model, prompt(0), terms, pair, sampler_name=sampler)[2]["samples"]
    expected = alone(model, prompt(0), each_cell(terms), pair, sampler=sampler)
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde", "uni_pc"])
@pytest.mark.parametrize("kind", ["img2img", "noise_mask", "mask for each", "batch_index", "nothing to denoise"])
def test_latents(sweep, alone, base, terms, prompt, sampler, kind):
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    latent, denoise = {"samples": image}, 1.0
    if kind == "img2img":
        denoise = 0.5
    elif kind == "nothing to denoise":
        denoise = 0.0
    elif kind == "batch_index":
        latent["batch_index"] = [3, 1]
    else:
        latent["noise_mask"] = half_mask().ceil()[: 1 if kind == "noise_mask" else 2]
    kept = {name: value.clone() if hasattr(value, "clone") else list(value) for name, value in latent.items()}
    out = sweep(base, prompt(0), terms, latent, sampler_name=sampler, denoise=denoise)[2]
    expected = alone(base, prompt(0), each_cell(terms), latent, sampler=sampler, denoise=denoise)
    assert torch.equal(out["samples"], expected)
    assert "batch_index" not in out, "it counted the batch of one cell"
    assert latent.keys() == kept.keys(), "the input is as it was"
    assert all(bool((torch.as_tensor(latent[name]) == torch.as_tensor(kept[name])).all()) for name in kept)


def test_real_models(sweep, alone, prior, concept, prompt, pair):
    terms = [
        GuidanceTerm(1.0, conditioning=prompt(1), label="a"),
        GuidanceTerm(1.0, model=concept, conditioning=prompt(2), label="b"),
    ]
    got = sweep(prior, prompt(0), terms, pair, "2", "1, -1", steps=2, sampler_name="euler_ancestral")[2]["samples"]
    cells = list(each_cell(terms, (2.0,), (1.0, -1.0)))
    expected = alone(prior, prompt(0), cells, pair, steps=2, sampler="euler_ancestral")
    assert torch.equal(got, expected)
    assert not torch.allclose(expected[:2], expected[2:], rtol=0.1), "the cells differ"


def test_an_idle_term_is_named_once(sweep, base, terms, prompt, latent, caplog):
    idle = replace(terms[0], start_percent=0.99, end_percent=0.99)
    sweep(base, prompt(0), [idle, terms[1]], latent, "1, 2", "2, 4")
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, warnings


def test_a_lost_cell_is_named_where_the_first_is_good(sweep, base, terms, prompt, latent, caplog):
    """A prompt so large that the numbers end, which the first cell does not read."""
    lost = replace(terms[0], conditioning=[[torch.full((1, 77, 768), 3e38), {}]])
    sweep(base, prompt(0), [lost, terms[1]], latent, "0, 100", "0")
    assert len([message for message in caplog.messages if "the samples hold NaN or infinity" in message]) == 1


def test_progress_goes_over_all_cells(sweep, base, terms, prompt, latent, monkeypatch):
    from comfyui_gcfg.nodes.runtime import ksampler

    seen = []
    monkeypatch.setattr(
        ksampler.latent_preview,
        "prepare_callback",
        lambda *_, **__: lambda step, denoised, x, total: seen.append((step + 1, total)),
    )
    sweep(base, prompt(0), terms, latent, "1, 2, 3", label_2="")
    assert seen == [(step, 12) for step in range(1, 13)]


# --- what comes out ---


def test_images_and_sheet(sweep, base, terms, prompt, pair, comfy):
    """Two rows of three cells through a real VAE: each picture is found on its sheet, and the labels beside it."""
    vae = comfy.sd.VAE(sd={key: value.clone() for key, value in vae_state_dict().items()})
    sheets, images, latent = sweep(base, prompt(0), terms, pair, "-1, 1.5, 3", "2, 10", vae=vae)
    assert images.shape == (12, 64, 64, 3)
    assert torch.equal(images, vae.decode(latent["samples"]))
    assert sheets.shape[0] == 2, "one for each latent of the batch"
    for number, sheet in enumerate(sheets):
        places = [find(sheet, image) for image in images[number::2]]
        ys, xs = sorted({y for y, _ in places}), sorted({x for _, x in places})
        assert places == [(y, x) for y in ys for x in xs], "row by row"
        assert len(ys) == 2
        assert len(xs) == 3
        assert min(b - a for line in (ys, xs) for a, b in pairwise(line)) > 64
        assert all(inked(sheet[: ys[0], x : x + 64]) for x in xs)
        assert all(inked(sheet[y : y + 64, : xs[0]]) for y in ys)
        assert not inked(sheet[: ys[0], : xs[0]])


def find(sheet, image):
    """Where a picture is on a sheet, to the pixel: (y, x) of its one place."""
    height, width = image.shape[:2]
    pixels, wanted = (sheet * 255).round(), (image.clamp(0, 1) * 255).round()
    windows = pixels.unfold(0, height, 1).unfold(1, width, 1)  # (y, x, 3, height, width)
    found = (windows[:, :, :, 0, 0] == wanted[0, 0]).all(-1).nonzero().tolist()
    (place,) = [(y, x) for y, x in found if torch.equal(pixels[y : y + height, x : x + width], wanted)]
    return place


def inked(part):
    return bool((part.amax(-1) < 0.4).any())


def test_labels_name_the_weights(sweep, base, terms, prompt, latent, monkeypatch):
    from comfyui_gcfg.nodes import weight_sweep as module

    asked = []
    monkeypatch.setattr(module, "labelled_sheet", lambda images, *labels: asked.append(labels) or torch.zeros(1, 1))
    sweep(base, prompt(0), terms, latent, "0:1:0.5", "-2", label_1=" a ")
    sweep(base, prompt(0), terms, latent, "0.125", label_1="b", label_2="  ")
    assert asked == [(["a 0", "a 0.5", "a 1"], ["b -2"]), (["b 0.125"], [""])]


@pytest.fixture
def sheet(comfy):
    from comfyui_gcfg.nodes.figures import labelled_sheet

    return labelled_sheet


def test_labels_stand_at_their_columns_and_rows(sheet):
    """Exchanging two labels exchanges what is written there, and nothing else."""
    images = torch.stack([torch.full((40, 60, 3), grey) for grey in (0.5, 0.6, 0.7, 0.8)])
    one = sheet(images, ["x 1", "x 2"], ["y 3", "y 4"])[0]
    (top, left), (_, second) = find(one, images[0]), find(one, images[1])
    (below, _) = find(one, images[2])
    columns = sheet(images, ["x 2", "x 1"], ["y 3", "y 4"])[0]
    assert torch.equal(one[:top, left : left + 60], columns[:top, second : second + 60])
    assert not torch.equal(one[:top, left : left + 60], columns[:top, left : left + 60])
    assert torch.equal(one[top:], columns[top:])
    rows = sheet(images, ["x 1", "x 2"], ["y 4", "y 3"])[0]
    assert torch.equal(one[top : top + 40, :left], rows[below : below + 40, :left])
    assert not torch.equal(one[top : top + 40, :left], rows[top : top + 40, :left])
    assert torch.equal(one[:, left:], rows[:, left:])


def test_one_row_without_labels_has_no_margin_for_them(sheet):
    images = torch.stack([torch.full((40, 60, 3), grey) for grey in (0.5, 0.6)])
    assert find(sheet(images, ["x 1", "x 2"], [""])[0], images[0])[1] < 10


def test_labels_longer_than_a_picture_do_not_overlap(sheet):
    images = torch.stack([torch.full((16, 16, 3), grey) for grey in (0.5, 0.6)])
    long = ["a concept of many words 1.5", "a concept of many words 2.5"]
    got = sheet(images, long, [""])[0]
    step = find(got, images[1])[1] - find(got, images[0])[1]
    blank = sheet(images, [long[0], ""], [""])[0]
    assert inked(blank[:10, :step])
    assert not inked(blank[:10, step + 10 :]), "the first label ends before the second column"


# --- bad input ---


NO_SUCH = "and no connected term has that label, expected exactly one of 'a', 'b'; correct it."
BOTH = "label_1 and label_2 are both 'a', expected two terms; change one."


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"label_1": "c"}, f"label_1 is 'c', {NO_SUCH}"),
        ({"label_1": " "}, f"label_1 is '', {NO_SUCH}"),
        ({"label_2": "A"}, f"label_2 is 'A', {NO_SUCH}"),
        ({"label_2": "a"}, BOTH),
        ({"label_2": " a "}, BOTH),
        (
            {"weights_1": "1, two"},
            "weights_1: 'two', expected a number such as 1.5, or a range such as 0:2:0.25; correct it.",
        ),
        (
            {"weights_2": ""},
            "weights_2 is empty, expected weights such as 0, 1.5, 3 or a range such as 0:2:0.25; add some.",
        ),
        (
            {"weights_1": "0:2:0.1", "weights_2": "0:2:0.1"},
            "441 cells, expected at most 400; shorten the lists of weights.",
        ),
    ],
)
def test_bad_widgets(sweep, base, terms, prompt, latent, calls, widgets, message):
    assert refusal(sweep, base, prompt(0), terms, latent, **widgets) == f"Weight Sweep: {message}"
    assert calls == []


def test_bad_terms(sweep, base, terms, prompt, latent):
    twice = [terms[0], replace(terms[1], label="a")]
    assert refusal(sweep, base, prompt(0), twice, latent, label_2="") == (
        "Weight Sweep: label_1 is 'a', and 2 connected terms have that label, expected exactly one of 'a', 'a'; give "
        "each Guidance Term its own label."
    )
    points = [replace(terms[0], curve=WeightCurve("points", points=((0.0, 1.0),))), terms[1]]
    assert refusal(sweep, base, prompt(0), points, latent) == (
        "Weight Sweep: label_1 is 'a', whose weight follows a list of points, expected a constant, linear or cosine "
        "curve whose weight can be replaced; choose another curve there."
    )


def test_without_a_vae_nothing_is_sampled(sweep, base, terms, prompt, latent, calls):
    assert refusal(sweep, base, prompt(0), terms, latent, vae=None) == (
        "Weight Sweep: vae is empty, expected a VAE; connect a Load VAE node where the checkpoint holds none."
    )
    assert calls == []


def test_no_term(sweep, base, prompt, latent):
    assert refusal(sweep, base, prompt(0), [], latent) == (
        "Weight Sweep: no guidance term is connected, expected at least one; connect the terms output of a Guidance "
        "Term node to term_1."
    )


def test_errors_of_a_run_name_this_node(sweep, base, terms, prompt):
    image = {"samples": torch.ones(1, 16, 8, 8)}
    assert refusal(sweep, base, prompt(0), terms, image) == (
        "Weight Sweep: latent_image has 16 channels, expected 4 as the unconditional model works with; encode the "
        "image with the VAE of this model."
    )


# --- what remains after a failure ---


@pytest.mark.parametrize("error", ["RuntimeError", "KeyboardInterrupt", "InterruptProcessingException"])
@pytest.mark.parametrize("where", ["model", "preview"])
def test_a_failure_leaves_nothing_behind(sweep, base, terms, prompt, latent, comfy, monkeypatch, calls, error, where):
    from comfyui_gcfg.nodes.runtime import ksampler

    interruption = sys.modules.get("comfy.interruption", comfy.model_management)
    kind = getattr(builtins, error, None) or getattr(interruption, error)
    run = {"weights_1": "1, 2, 3", "sampler_name": "euler_ancestral"}
    expected = sweep(base, prompt(0), terms, latent, **run)[2]["samples"]
    patchers = base, terms[1].model
    states = [{k: v.clone() for k, v in p.model.state_dict().items()} for p in patchers]
    options = [dict(p.model_options["transformer_options"]) for p in patchers]

    def fail(*_args, **_kwargs):
        raise kind

    with monkeypatch.context() as patch:
        if where == "preview":
            patch.setattr(ksampler.latent_preview, "prepare_callback", lambda *_, **__: fail)
        else:
            count = len(calls)
            own = base.model_options["model_function_wrapper"]
            patch.setitem(
                base.model_options,
                "model_function_wrapper",
                lambda apply, args: fail() if len(calls) > count + 4 else own(apply, args),
            )
        with pytest.raises(kind):
            sweep(base, prompt(0), terms, latent, **run)
    for patcher, state, option in zip(patchers, states, options, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in patcher.model.state_dict().items())
        assert patcher.model_options["transformer_options"] == option
        assert getattr(patcher.model, "current_patcher", None) is None
    assert torch.equal(sweep(base, prompt(0), terms, latent, **run)[2]["samples"], expected)
