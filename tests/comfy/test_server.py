"""The server over HTTP and websocket: progress, a cancelled prompt, bad input. Each against a real server."""

import threading
import time

import numpy
import pytest
from comfyui_gcfg.testkit.errors import PromptFailed, PromptInterrupted

LORA = "style-lora.safetensors"


@pytest.fixture
def simple(api_prompt):
    """Two terms on one prior, 64 pixels: the decoupled branch of the condition-decoupling workflow."""
    prompt = api_prompt("condition-decoupling", steps=3)
    doomed = {n for n, e in prompt.items() if e["_meta"]["title"].lower() in ("coupled", "both in one prompt")}
    while True:
        more = {
            n
            for n, e in prompt.items()
            if n not in doomed and any(isinstance(v, list) and v[0] in doomed for v in e["inputs"].values())
        }
        if not more:
            return {n: e for n, e in prompt.items() if n not in doomed}
        doomed |= more


def edited(prompt, node, **inputs):
    return {**prompt, node: {**prompt[node], "inputs": {**prompt[node]["inputs"], **inputs}}}


def terms_of(prompt):
    return [node for node, entry in prompt.items() if entry["class_type"] == "GCFGGuidanceTerm"]


def test_every_node_is_registered(client):
    expected = {
        "GCFGLoadConceptUNet": (["MODEL"], "Load Concept UNet"),
        "GCFGNullTextPatch": (["MODEL"], "Null-Text Patch"),
        "GCFGGuidanceTerm": (["GCFG_TERMS"], "Guidance Term"),
        "GCFGDecoupledPrompt": (["GCFG_TERMS"], "Decoupled Prompt"),
        "GCFGRegionTerms": (["GCFG_TERMS"], "Region Terms"),
        "GCFGGuidanceRelation": (["GCFG_TERMS"], "Guidance Relation"),
        "GCFGGuidanceCache": (["GCFG_TERMS"], "Guidance Cache"),
        "GCFGGuider": (["GUIDER", "GCFG_REPORT"], "GCFG Guider"),
        "GCFGKSampler": (["LATENT", "GCFG_REPORT"], "GCFG KSampler"),
        "GCFGKSamplerAdvanced": (["LATENT", "GCFG_REPORT"], "GCFG KSampler (Advanced)"),
        "GCFGModel": (["MODEL", "GCFG_REPORT"], "GCFG Model"),
        "GCFGWeightSweep": (["IMAGE", "IMAGE", "LATENT"], "Weight Sweep"),
        "GCFGGuidanceReport": (["IMAGE", "STRING", "STRING"], "Guidance Report"),
    }
    ours = {k: (v["output"], v["display_name"]) for k, v in client.object_info.items() if k.startswith("GCFG")}
    assert ours == expected


def test_progress_arrives_step_by_step(client, simple, node_of):
    run = client.run(edited(simple, node_of(simple, "GCFGKSampler"), steps=4, seed=1))
    assert [(p.done, p.total) for p in run.progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {str(p.node) for p in run.progress} == {node_of(simple, "GCFGKSampler")}
    assert run.previews >= 4, "a live preview for each step"
    entry = client.history(run.prompt_id)
    assert entry["status"]["status_str"] == "success"
    assert run.images


def test_a_cancelled_prompt_leaves_the_models_as_they_were(client, simple, pixels, node_of):
    """Before and after a run that is cancelled in mid-sampling, with a LoRA on a clone, one seed gives one image."""
    sampler, loader = node_of(simple, "GCFGKSampler"), node_of(simple, "CheckpointLoaderSimple")
    first, second = terms_of(simple)
    before = pixels(client.run(edited(simple, first, label="before")))

    long = edited(simple, sampler, steps=200, seed=5)
    long["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": [loader, 0], "lora_name": LORA, "strength_model": 1.0},
    }
    long = edited(long, second, model=["lora", 0])
    seen = []

    def cancel_in_the_middle(progress):
        seen.append(progress.done)
        if progress.done == 3:
            client.interrupt()

    with pytest.raises(PromptInterrupted):
        client.run(long, cancel_in_the_middle)
    assert 3 <= max(seen) < 100  # it was running, and it did stop

    # another label: the sampler runs again instead of coming from the server's cache
    run = client.run(edited(simple, first, label="after"))
    assert len(run.progress) == 3
    assert numpy.array_equal(pixels(run), before)


def test_a_failing_prompt_leaves_the_models_as_they_were(client, simple, pixels, node_of):
    first, _ = terms_of(simple)
    before = pixels(client.run(edited(simple, first, label="before failure")))
    with pytest.raises(PromptFailed):
        client.run(edited(simple, first, start_percent=0.9, end_percent=0.1))
    run = client.run(edited(simple, first, label="after failure"))
    assert len(run.progress) == 3
    assert numpy.array_equal(pixels(run), before)


def message_of(client, prompt):
    with pytest.raises(PromptFailed) as caught:
        client.run(prompt)
    return caught.value


def test_no_term_connected(client, simple, node_of):
    sampler = node_of(simple, "GCFGKSampler")
    kept = {k: v for k, v in simple[sampler]["inputs"].items() if not k.startswith("term_")}
    error = message_of(client, {**simple, sampler: {**simple[sampler], "inputs": kept}})
    message = error.details["exception_message"]
    assert "GCFG KSampler" in message
    assert "term" in message
    assert "\n" not in message.strip()
    assert error.details["node_id"] == sampler


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(client, simple, weight):
    """Python's JSON carries NaN; ComfyUI's own range check lets NaN through, ours must not."""
    first, _ = terms_of(simple)
    error = message_of(client, edited(simple, first, weight=weight))
    assert "weight" in str(error)
    assert "Guidance Term" in str(error) or "GCFGGuidanceTerm" in str(error)
    if numpy.isnan(weight):
        assert error.details["node_id"] == first
        assert "nan" in error.details["exception_message"].lower()


def test_start_after_end(client, simple):
    first, _ = terms_of(simple)
    error = message_of(client, edited(simple, first, start_percent=0.8, end_percent=0.2, label="late"))
    assert "start_percent" in error.details["exception_message"]
    assert "end_percent" in error.details["exception_message"]
    assert "late" in error.details["exception_message"]


def test_models_of_two_latent_families(client, simple, node_of):
    """An SDXL term beside an SD1.5 prior is refused with the term's label, before any step."""
    prompt = dict(simple)
    prompt["xl"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_base_1.0.safetensors"}}
    first, _ = terms_of(prompt)
    error = message_of(client, edited(prompt, first, model=["xl", 0], label="wrong family"))
    assert "wrong family" in error.details["exception_message"]


def test_a_missing_file_is_refused_by_name(client, simple, node_of):
    prompt = dict(simple)
    prompt["concept"] = {
        "class_type": "GCFGLoadConceptUNet",
        "inputs": {"unet_name": "../../secret.safetensors", "weight_dtype": "default"},
    }
    first, _ = terms_of(prompt)
    error = message_of(client, edited(prompt, first, model=["concept", 0]))
    assert "secret.safetensors" in str(error)


def test_two_clients_at_once(client, simple, pixels, node_of):
    """Two prompts queued together give what each gives alone."""
    sampler = node_of(simple, "GCFGKSampler")
    prompts = [edited(simple, sampler, seed=seed) for seed in (21, 22)]
    alone = [pixels(client.run(prompt)) for prompt in prompts]
    first, _ = terms_of(simple)
    runs = [None, None]

    def work(i):
        runs[i] = client.run(edited(prompts[i], first, label=f"together {i}"))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(120)
    assert all(len(run.progress) == 3 for run in runs)
    assert numpy.array_equal(pixels(runs[0]), alone[0])
    assert numpy.array_equal(pixels(runs[1]), alone[1])
