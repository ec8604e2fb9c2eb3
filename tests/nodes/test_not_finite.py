"""NaN and infinity: named in the log where they come in or go out, and never in what leaves as JSON."""

import json
import logging
import types

import pytest
import torch
from comfyui_gcfg.gcfg.curves import WeightCurve
from comfyui_gcfg.gcfg.terms import GuidanceTerm

NAN, INF = float("nan"), float("inf")
IN = (
    "{}: latent_image holds NaN or infinity, expected finite numbers, so the image will be lost; look at the node that "
    "made the latent."
)
OUT = (
    "{}: the samples hold NaN or infinity{}, expected finite numbers, so the image is lost; lower the weights, or load "
    "the models in a wider precision."
)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def breaking_at(model, step):
    """A clone whose predictions are NaN from a step on, counted from 1."""
    clone, calls = model.clone(), []

    def predict(apply_model, args):
        calls.append(1)
        made = apply_model(args["input"], args["timestep"], **args["c"])
        return made * NAN if len(calls) >= step else made

    clone.set_model_unet_function_wrapper(predict)
    return clone


@pytest.fixture
def node(comfy, prior, prompt, latent):
    from comfyui_gcfg.nodes.sampling import GCFGKSampler

    def sample(terms, latent=latent, model=prior, looked_at=False, steps=3):
        graph = {"9": {"inputs": {"report": ["7", 1]}}} if looked_at else {}
        out = GCFGKSampler().sample(
            model, 1, steps, "euler", "normal", prompt(0), latent, 1.0, unique_id="7", prompt=graph, term_1=tuple(terms)
        )
        return out["result"] if isinstance(out, dict) else out

    return sample


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_latent_that_comes_in(node, prompt, latent, warnings, bad):
    samples = latent["samples"].clone()
    samples[0, 1, 2, 3] = bad
    node([GuidanceTerm(2.0, conditioning=prompt(1))], {"samples": samples})
    assert warnings() == [IN.format("GCFG KSampler")], "once, and what goes out is not named too"


@pytest.mark.parametrize(("looked_at", "step"), [(True, " (the guidance from step 2 on)"), (False, "")])
def test_samples_that_go_out(node, prior, prompt, warnings, looked_at, step):
    """The step is told where readings were taken anyway."""
    node([GuidanceTerm(2.0, conditioning=prompt(1))], model=breaking_at(prior, 2), looked_at=looked_at)
    assert warnings() == [OUT.format("GCFG KSampler", step)]


def test_a_good_run_says_nothing(node, prompt, warnings):
    node([GuidanceTerm(2.0, conditioning=prompt(1))])
    assert warnings() == []


def test_the_guider_for_stock_samplers(comfy, prior, prompt, latent, warnings):
    from comfyui_gcfg.nodes.sampling import GCFGGuider

    guider, _ = GCFGGuider().make(breaking_at(prior, 1), prompt(0), term_1=(GuidanceTerm(2.0, conditioning=prompt(1)),))
    sampler = comfy.samplers.sampler_object("euler")
    guider.sample(latent["samples"], latent["samples"], sampler, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=0)
    assert warnings() == [OUT.format("GCFG Guider", "")]


@pytest.mark.parametrize("hooked", [False, True])
def test_a_sweep_says_it_once(comfy, prior, prompt, latent, warnings, hooked):
    from comfyui_gcfg.nodes.weight_sweep import GCFGWeightSweep

    model = prior.clone()
    if hooked:
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    term = GuidanceTerm(2.0, conditioning=prompt(1), label="a")
    vae = types.SimpleNamespace(decode=lambda samples: torch.zeros(len(samples), 8, 8, 3))

    def sweep(model, latent):
        GCFGWeightSweep().sweep(
            *(model, 0, 2, "euler", "normal", prompt(0), latent, 1.0, vae, "a", "1, 2, 3", "", ""), term_1=(term,)
        )

    sweep(model, {"samples": latent["samples"] * NAN})
    assert warnings() == [IN.format("Weight Sweep")]
    sweep(breaking_at(model, 1), latent)
    assert warnings()[1:] == [OUT.format("Weight Sweep", "")]


def test_only_numbers_leave_as_json(comfy, prior, prompt, latent, monkeypatch):
    """Messages to the editor, the history's results and the report of a run of NaN, read back strictly."""
    from comfyui_gcfg.nodes.report import GCFGGuidanceReport
    from comfyui_gcfg.nodes.runtime import live
    from comfyui_gcfg.nodes.sampling import GCFGKSampler

    sent = []
    server = types.SimpleNamespace(client_id="me", send_sync=lambda *message: sent.append(json.dumps(message)))
    monkeypatch.setattr(live, "prompt_server", lambda: server)
    terms = (
        GuidanceTerm(2.0, conditioning=prompt(1), label="a\ud83d\x1b[31m"),
        GuidanceTerm(1.0, conditioning=prompt(2), curve=WeightCurve("linear", -INF)),  # what no node lets in
    )
    model = breaking_at(prior, 2)
    out = GCFGKSampler().sample(
        model, 1, 3, "euler", "normal", prompt(0), latent, 1.0, unique_id="7", prompt={}, term_1=terms
    )
    (chart,) = json.loads(json.dumps(out["ui"]), parse_constant=refuse)["gcfg"]
    assert chart["labels"] == [r"a\ud83d\x1b[31m", "2"]
    assert chart["readings"][1]["total"] is None
    assert None in [weight for reading in chart["readings"] for weight in reading["weights"]]
    assert sent
    for message in sent:
        json.loads(message, parse_constant=refuse)
    plot, as_json, as_csv = GCFGGuidanceReport().make(out["result"][1])
    assert json.loads(as_json, parse_constant=refuse) == chart
    assert "nan" not in as_csv.lower()
    assert "inf" not in as_csv.lower()
    assert as_csv.isprintable() or as_csv.replace("\n", "").isprintable()
    assert bool(plot.isfinite().all())
