"""Video and nested latents: masks per frame and stream, weights per stream, every node that takes a latent."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.terms import GuidanceTerm

ZOO = runpy.run_path(str(Path(__file__).with_name("zoo.py")))
FAMILIES, nested, normal = ZOO["FAMILIES"], ZOO["nested"], ZOO["normal"]
CLOSE = 1e-4  # the same float32 predictions, summed in another order
SETTINGS = {"steps": 1, "scheduler": "simple"}


def built(name, seed):
    try:
        return FAMILIES[name].model(seed)
    except LookupError as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=["ltxav", "minimax_h3"])
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def models(request, family, comfy):
    name = request.node.callspec.params["family"]
    return built(name, 0), built(name, 1)


@pytest.fixture
def denoised(stock, family, models):
    """D of the first or the second model, stream by stream: one Euler step to sigma 0 returns it."""

    def evaluate(model, seed):
        cond = family.conditioning(seed)
        return stock(models[model], cond, cond, family.latent(), cfg=1.0, **SETTINGS).unbind()

    return evaluate


def close(a, b):
    return all(float((x - y).abs().max()) <= CLOSE * float(y.abs().max()) for x, y in zip(a, b, strict=True))


def test_weights_by_stream_through_the_node(family, models, denoised, gcfg):
    from comfyui_gcfg.nodes.guidance import GCFGGuidanceTerm

    (terms,) = GCFGGuidanceTerm().make(
        2.0, 0.0, 1.0, models[1], family.conditioning(1), stream_weights="audio: 0.5, video: 1"
    )
    got = gcfg(models[0], family.conditioning(0), terms, family.latent(), **SETTINGS).unbind()
    base, concept = denoised(0, 0), denoised(1, 1)
    factors = (2.0, 1.0)
    assert close(got, [b + w * (c - b) for b, c, w in zip(base, concept, factors, strict=True)])
    assert not close(got, [b + 2.0 * (c - b) for b, c in zip(base, concept, strict=True)])


def test_a_stream_without_weight_is_the_priors(family, models, denoised, gcfg):
    term = GuidanceTerm(2.0, model=models[1], conditioning=family.conditioning(1), stream_weights={"audio": 0.0})
    video, audio = gcfg(models[0], family.conditioning(0), [term], family.latent(), **SETTINGS).unbind()
    assert close([audio], denoised(0, 0)[1:])
    assert not close([video], denoised(0, 0)[:1])


def test_an_unknown_stream(family, models, gcfg):
    term = GuidanceTerm(2.0, model=models[1], stream_weights={"image": 0.0})
    with pytest.raises(
        GuidanceError, match=r"^Guidance Term '1': stream_weights names 'image', expected video or audio,"
    ):
        gcfg(models[0], family.conditioning(0), [term], family.latent(), **SETTINGS)


def test_nested_masks_each_at_its_stream(family, models, denoised, gcfg, comfy):
    base, concept = denoised(0, 0), denoised(1, 1)
    masks = [torch.rand(1, *part.shape[-2:], generator=torch.Generator().manual_seed(3)) for part in base]
    term = GuidanceTerm(2.0, model=models[1], conditioning=family.conditioning(1), mask=nested(masks))
    got = gcfg(models[0], family.conditioning(0), [term], family.latent(), **SETTINGS).unbind()
    fitted = [comfy.sampler_helpers.prepare_mask(m, part.shape, "cpu") for m, part in zip(masks, base, strict=True)]
    assert close(got, [b + 2.0 * m * (c - b) for b, c, m in zip(base, concept, fitted, strict=True)])


def test_advanced_without_noise_goes_on_where_another_stopped(family, models, stock):
    from comfyui_gcfg.nodes.sampling import GCFGKSamplerAdvanced

    prior, text, empty = models[0], family.conditioning(1), family.conditioning(0)

    def ours(latent, add_noise, first, last, leftover):
        term = GuidanceTerm(4.0, conditioning=text)
        node = GCFGKSamplerAdvanced()
        return node.sample(
            prior, add_noise, 1, 4, "euler", "simple", empty, latent, first, last, leftover, term_1=(term,)
        )[0]

    half = ours(family.latent(), "enable", 0, 2, "enable")
    got = ours(half, "disable", 2, 10000, "disable")["samples"].unbind()
    theirs = sys.modules["nodes"].common_ksampler
    args = (prior, 1, 4, 4.0, "euler", "simple", text, empty)
    (first,) = theirs(*args, family.latent(), start_step=0, last_step=2)
    if not hasattr(sys.modules["comfy.sample"], "prepare_empty_noise"):
        pytest.skip("stock KSampler (Advanced) fails on nested latents in this ComfyUI")
    (whole,) = theirs(*args, first, disable_noise=True, start_step=2, last_step=10000, force_full_denoise=True)
    assert all(map(torch.equal, got, whole["samples"].unbind()))


class _Decoder:
    """A VAE that shows what it was given as frames."""

    def decode(self, samples):
        assert isinstance(samples, torch.Tensor)
        return samples[:, :3].movedim(1, -1).clamp(0, 1)


@pytest.mark.parametrize("family", ["ltxav"], indirect=True)
def test_a_sweep_decodes_the_video(family, models, gcfg):
    from comfyui_gcfg.nodes.weight_sweep import GCFGWeightSweep

    def terms(weight):
        return (GuidanceTerm(weight, model=models[1], conditioning=family.conditioning(1), label="concept"),)

    prior, empty = models[0], family.conditioning(0)
    sheet, images, latent = GCFGWeightSweep().sweep(
        prior, 1, 2, "euler", "simple", empty, family.latent(), 1.0, _Decoder(), "concept", "1, 2", "", "",
        term_1=terms(0.0),
    )  # fmt: skip
    frames = family.shapes[0][1]
    assert images.shape[0] == 2 * frames
    assert sheet.shape[0] == frames
    for place, weight in enumerate((1.0, 2.0)):
        alone = gcfg(prior, empty, terms(weight), family.latent(), steps=2, scheduler="simple").unbind()
        assert all(
            torch.equal(part[place : place + 1], one)
            for part, one in zip(latent["samples"].unbind(), alone, strict=True)
        )


@pytest.mark.parametrize("family", ["ltxav"], indirect=True)
def test_a_sweep_under_guidance_nodes_joins_nested_cells(family, models, gcfg):
    from comfyui_gcfg.nodes.runtime.guider import GCFGGuider
    from comfyui_gcfg.nodes.runtime.ksampler import sample_cells

    hooked = models[0].clone()
    hooked.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)

    def terms(weight):
        return [GuidanceTerm(weight, model=models[1], conditioning=family.conditioning(1))]

    guiders = [GCFGGuider(hooked, family.conditioning(0), terms(weight), "Weight Sweep") for weight in (1.0, 2.0)]
    settings = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "simple"}
    cells = sample_cells(guiders, family.latent(), **settings)["samples"].unbind()
    alone = gcfg(hooked, family.conditioning(0), terms(2.0), family.latent(), steps=2, scheduler="simple").unbind()
    assert all(torch.equal(part[1:], one) for part, one in zip(cells, alone, strict=True))


def test_a_mask_per_frame(stock, gcfg, comfy):
    """Five masks on three latent frames, as stock's noise masks are brought to them."""
    family = FAMILIES["wan21"]
    prior, concept = built("wan21", 0), built("wan21", 1)
    mask = (torch.arange(5.0) > 2)[:, None, None].expand(5, 32, 32) * torch.linspace(0, 1, 32)

    def denoised(model, seed):
        cond = family.conditioning(seed)
        return stock(model, cond, cond, family.latent(), cfg=1.0, **SETTINGS)

    term = GuidanceTerm(2.0, model=concept, conditioning=family.conditioning(1), mask=mask)
    got = gcfg(prior, family.conditioning(0), [term], family.latent(), **SETTINGS)
    base = denoised(prior, 0)
    fitted = comfy.sampler_helpers.prepare_mask(mask, base.shape, "cpu")
    assert float(fitted[:, :, 0].max()) == 0.0 < float(fitted[:, :, 2].max())
    assert close([got], [base + 2.0 * fitted * (denoised(concept, 1) - base)])


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.architecture not in ("UNet", "nested")])
@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_text_of_another_width(gcfg, name, width):
    family, model = FAMILIES[name], built(name, 0)
    expected = family.text[1]
    found = 8 if width == "narrow" else 2 * expected
    wrong = family.conditioning(1, found)
    settings = {"latent": family.latent(), **SETTINGS}
    with pytest.raises(GuidanceError) as error:
        gcfg(model, family.conditioning(0), [GuidanceTerm(2.0, conditioning=wrong)], **settings)
    told = f"is {found} wide, expected {expected} for this model; encode the prompt with the CLIP that belongs to the"
    assert str(error.value) == f"Guidance Term '1': conditioning {told} model."
    with pytest.raises(GuidanceError) as error:
        gcfg(model, wrong, [GuidanceTerm(2.0, conditioning=family.conditioning(0))], **settings)
    assert str(error.value) == f"GCFG KSampler: unconditional {told} model."


READS_POOLED = ["sdxl", "cascade_c", "sd3", "hidream", "kandinsky5"]


@pytest.mark.parametrize("name", READS_POOLED)
def test_pooled_output_of_another_width(gcfg, name):
    family, model = FAMILIES[name], built(name, 0)
    expected = family.pooled[-1]
    [[text, options]] = family.conditioning(1)
    wrong = [[text, {**options, "pooled_output": normal((*family.pooled[:-1], expected + 8), 4)}]]
    with pytest.raises(GuidanceError) as error:
        gcfg(model, family.conditioning(0), [GuidanceTerm(2.0, conditioning=wrong)], family.latent(), **SETTINGS)
    assert str(error.value) == (
        f"Guidance Term '1': conditioning: its pooled output is {expected + 8} wide, expected {expected} for this "
        f"model; encode the prompt with the CLIP that belongs to the model."
    )


@pytest.mark.parametrize("name", [*READS_POOLED, "hunyuan_video"])
def test_no_pooled_output(gcfg, name):
    family, model = FAMILIES[name], built(name, 0)
    [[text, options]] = family.conditioning(1)
    without = [[text, {key: value for key, value in options.items() if key != "pooled_output"}]]
    with pytest.raises(GuidanceError) as error:
        gcfg(model, without, [GuidanceTerm(2.0, conditioning=family.conditioning(0))], family.latent(), **SETTINGS)
    assert str(error.value) == (
        "GCFG KSampler: unconditional has no pooled output, expected one, which this model reads beside the text; "
        "encode the prompt with the CLIP that belongs to the model."
    )


@pytest.mark.parametrize(
    ("name", "other", "expected"),
    [
        ("sd15", "wan21", "(batch, channels, height, width) with 4"),
        ("sd15", "stable_audio", "(batch, channels, height, width) with 4"),
        ("sd15", "ltxav", "(batch, channels, height, width) with 4"),
        ("zimage", "ltxv", "(batch, channels, height, width) with 16"),
        ("wan21", "ltxav", "(batch, channels, frames, height, width) with 16"),
        ("ltxav", "stable_audio", "(batch, channels, frames, height, width) with 128"),
        ("stable_audio", "sd15", "(batch, channels, length) with 64"),
    ],
)
def test_a_latent_of_another_kind(gcfg, name, other, expected):
    """ComfyUI gives an empty latent the model's channels, not its axes."""
    built(other, 0)  # else this ComfyUI makes no such latents
    family, model, latent = FAMILIES[name], built(name, 0), FAMILIES[other].latent()
    with pytest.raises(GuidanceError) as error:
        gcfg(
            model, family.conditioning(0), [GuidanceTerm(2.0, conditioning=family.conditioning(1))], latent, **SETTINGS
        )
    said = str(error.value)
    assert said.startswith("GCFG KSampler: latent_image has shape (1, ")
    assert f"expected {expected} channels, as the unconditional model works with, which failed on it (" in said
    assert said.endswith("; make it with the node or the VAE that belongs to the model.")
