"""Bad input, one line each, with the exact sentence that the user reads."""

from dataclasses import replace

import pytest
import torch
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal

NAN, INF = float("nan"), float("inf")


def text(prompt):
    return GuidanceTerm(2.0, conditioning=prompt(1))


@pytest.fixture
def term_node(comfy):
    from comfyui_gcfg.nodes.guidance import GCFGGuidanceTerm

    return GCFGGuidanceTerm().make


@pytest.mark.parametrize("node", ["GCFGKSampler", "GCFGKSamplerAdvanced", "GCFGGuider"])
def test_no_term(prior, prompt, latent, node):
    from comfyui_gcfg.nodes import sampling

    calls = {
        "GCFGKSampler": ("GCFG KSampler", lambda n: n.sample(prior, 0, 4, "euler", "normal", prompt(0), latent, 1.0)),
        "GCFGKSamplerAdvanced": (
            "GCFG KSampler (Advanced)",
            lambda n: n.sample(
                prior, "enable", 0, 4, "euler", "normal", prompt(0), latent, 0, 4, "disable", term_2=None
            ),
        ),
        "GCFGGuider": ("GCFG Guider", lambda n: n.make(prior, prompt(0), term_8=())),
    }
    name, call = calls[node]
    assert refusal(call, getattr(sampling, node)()) == (
        f"{name}: no guidance term is connected, expected at least one; connect the terms output of a Guidance Term "
        f"node to term_1."
    )


@pytest.mark.parametrize("weight", [NAN, INF, -INF, 100.0001, -1e308])
def test_weight_is_out_of_range(term_node, weight):
    assert refusal(term_node, weight, 0.0, 1.0, label="style") == (
        f"Guidance Term 'style': weight is {weight}, expected a number from -100 to 100; type one, such as 1.5."
    )


def test_start_after_end(term_node):
    assert refusal(term_node, 1.0, 0.6, 0.4, label="style") == (
        "Guidance Term 'style': start_percent is 0.6 and end_percent is 0.4, expected start_percent <= end_percent; "
        "swap them."
    )


@pytest.mark.parametrize("percent", [-0.1, 1.5, NAN])
def test_percent_out_of_range(term_node, percent):
    assert refusal(term_node, 1.0, percent, 1.0) == (
        f"Guidance Term: start_percent is {percent:g}, expected 0 (pure noise) to 1 (the clean image); correct it."
    )


def test_neither_model_nor_conditioning(gcfg, prior, prompt, latent):
    assert refusal(gcfg, prior, prompt(0), [GuidanceTerm(2.0, label="nothing")], latent) == (
        "Guidance Term 'nothing': neither model nor conditioning is connected, expected at least one, because without "
        "them the term predicts the unconditional itself and changes nothing; connect one."
    )


def test_model_of_another_latent_format(gcfg, prior, prompt, latent, load_unet, weights):
    sdxl = load_unet(weights("sdxl", 0))
    term = GuidanceTerm(2.0, model=sdxl, conditioning=prompt(1, 2048), label="style")
    assert refusal(gcfg, prior, prompt(0), [term], latent) == (
        "Guidance Term 'style': latent format is SDXL, expected SD15 like the unconditional model's; use models of one "
        "latent family."
    )


def test_wrong_latent_channels_of_a_model(gcfg, prior, concept, prompt, latent, comfy):
    import comfy.latent_formats

    other = concept.clone()
    other.add_object_patch("latent_format", comfy.latent_formats.SD3())
    term = GuidanceTerm(2.0, model=other, conditioning=prompt(1), label="style")
    assert refusal(gcfg, prior, prompt(0), [term], latent) == (
        "Guidance Term 'style': latent has 16 channels, expected 4 as the unconditional model works with; use models "
        "of one latent family."
    )


def test_flow_model_with_eps_model(gcfg, prior, concept, prompt, latent, comfy):
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow = concept.clone()
    flow.add_object_patch("model_sampling", Flow(flow.model.model_config))
    term = GuidanceTerm(2.0, model=flow, conditioning=prompt(1), label="style")
    assert refusal(gcfg, prior, prompt(0), [term], latent) == (
        "Guidance Term 'style': model is a flow model, expected a diffusion (eps or v) model like the unconditional "
        "model, because their noise levels mean different things; use two models of one kind."
    )


def test_latent_image_of_the_wrong_channels(gcfg, prior, prompt):
    image = {"samples": torch.ones(1, 16, 8, 8)}
    assert refusal(gcfg, prior, prompt(0), [GuidanceTerm(2.0, conditioning=prompt(1))], image) == (
        "GCFG KSampler: latent_image has 16 channels, expected 4 as the unconditional model works with; encode the "
        "image with the VAE of this model."
    )


def test_conditioning_without_text(gcfg, prior, prompt, latent):
    term = GuidanceTerm(2.0, conditioning=[[None, {}]], label="style")
    assert refusal(gcfg, prior, prompt(0), [term], latent) == (
        "Guidance Term 'style': conditioning holds no text, which this model reads; connect a CLIP Text Encode node."
    )


def test_conditioning_of_the_wrong_width(gcfg, prior, prompt, latent):
    term = GuidanceTerm(2.0, conditioning=prompt(1, 2048), label="style")
    assert refusal(gcfg, prior, prompt(0), [term], latent) == (
        "Guidance Term 'style': conditioning is 2048 wide, expected 768 for this model; encode the prompt with the "
        "CLIP that belongs to the model."
    )
    good = GuidanceTerm(2.0, conditioning=prompt(1))
    assert refusal(gcfg, prior, prompt(0, 1024), [good], latent) == (
        "GCFG KSampler: unconditional is 1024 wide, expected 768 for this model; encode the prompt with the CLIP that "
        "belongs to the model."
    )


def test_empty_conditioning(gcfg, prior, prompt, latent):
    assert refusal(gcfg, prior, prompt(0), [GuidanceTerm(2.0, conditioning=[], label="style")], latent) == (
        "Guidance Term 'style': conditioning is empty, expected at least one prompt; connect a CLIP Text Encode node."
    )


def test_odd_masks(term_node, prompt):
    assert refusal(term_node, 1.0, 0.0, 1.0, None, prompt(1), torch.zeros(0, 64, 64), label="face") == (
        "Guidance Term 'face': mask has no pixels, expected at least one; paint the region where the term should act, "
        "or disconnect the mask."
    )
    assert refusal(term_node, 1.0, 0.0, 1.0, None, prompt(1), torch.ones(1, 3, 64, 64)) == (
        "Guidance Term: mask has shape (1, 3, 64, 64), expected (height, width) or (batch, height, width); connect a "
        "MASK output."
    )


@pytest.mark.parametrize("other", [[], [GuidanceTerm(1.0, label="plain")]], ids=["alone", "beside another"])
def test_a_mask_of_zeros_switches_its_term_off(
    term_node, gcfg, prior, concept, prompt, latent, caplog, count_forwards, other
):
    """A detector that found nothing must not fail the prompt."""
    other = [replace(term, conditioning=prompt(1)) for term in other]
    calls = count_forwards(concept)
    (terms,) = term_node(2.0, 0.0, 1.0, concept, prompt(2), torch.zeros(1, 64, 64))
    got = gcfg(prior, prompt(0), [*other, *terms], latent)
    assert (
        f"Guidance Term '{len(other) + 1}': its mask is zero everywhere, so the term does nothing; paint the region "
        f"where it should act, or disconnect it."
    ) in caplog.messages
    assert not calls
    assert torch.equal(got, gcfg(prior, prompt(0), other or [GuidanceTerm(0.0, conditioning=prompt(1))], latent))


def test_stream_weights_of_zero_switch_their_term_off(term_node, gcfg, prior, concept, prompt, latent, caplog):
    (terms,) = term_node(2.0, 0.0, 1.0, concept, prompt(2), torch.ones(1, 64, 64), stream_weights="image: 0")
    gcfg(prior, prompt(0), terms, latent)
    assert (
        "Guidance Term '1': its stream_weights are zero everywhere, so the term does nothing; give a stream another "
        "weight."
    ) in caplog.messages


def test_a_long_label_is_cut_in_errors(term_node):
    said = refusal(term_node, 1.0, 0.0, 1.0, label="\ud83d" * 100_000, curve="points", points="x")
    assert said.startswith(r"Guidance Term '\ud83d\ud83d")
    assert len(said) < 400


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (1, 4, 0, 8)])
def test_a_latent_that_holds_nothing(gcfg, prior, prompt, shape):
    assert refusal(
        gcfg, prior, prompt(0), [replace(text(prompt), mask=torch.ones(1, 8, 8))], {"samples": torch.zeros(shape)}
    ) == (
        f"GCFG KSampler: latent_image has shape {shape} and so holds nothing, expected at least one latent; give it a "
        f"batch of 1 or more and a size above 0."
    )


def test_term_that_never_becomes_active(gcfg, prior, concept, prompt, latent, caplog, count_forwards):
    calls = count_forwards(concept)
    always = GuidanceTerm(3.0, conditioning=prompt(1))
    never = GuidanceTerm(2.0, 0.985, 0.99, model=concept, conditioning=prompt(2), label="late")
    got = gcfg(prior, prompt(0), [always, never], latent)
    assert (
        "Guidance Term 'late': no step of this run lies between 0.985 and 0.99 of the noise schedule, so the term "
        "never becomes active; widen start_percent and end_percent, or take more steps."
    ) in caplog.messages
    assert not calls
    assert torch.equal(got, gcfg(prior, prompt(0), [always], latent))


def test_unconditional_without_a_prompt_at_some_step(gcfg, prior, prompt, latent):
    import sys

    early = sys.modules["nodes"].ConditioningSetTimestepRange().set_range(prompt(0), 0.0, 0.3)[0]
    message = refusal(gcfg, prior, early, [GuidanceTerm(2.0, conditioning=prompt(1))], latent)
    assert message.startswith("GCFG KSampler: unconditional is limited to a part of the sampling and has no prompt at")
    assert message.endswith("expected one at every step; combine it with a conditioning for the rest.")
    assert torch.isfinite(gcfg(prior, prompt(0), [GuidanceTerm(2.0, conditioning=prompt(1))], latent)).all()


def test_term_socket_chain(term_node, prompt):
    """A Guidance Term appends itself to the terms that it is given."""
    first = term_node(1.0, 0.0, 1.0, conditioning=prompt(1), label="a")[0]
    both = term_node(2.0, 0.0, 1.0, conditioning=prompt(2), terms=first, label=" b ")[0]
    assert [(t.label, t.weight) for t in both] == [("a", 1.0), ("b", 2.0)]
    assert len(first) == 1
