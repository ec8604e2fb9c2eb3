"""The shared workflows: as files, against a live server, and run by it."""

import itertools
from pathlib import Path

import numpy
import pytest
from comfyui_gcfg.testkit import prompts
from comfyui_gcfg.testkit.workflow import problems, refusing_nodes, to_prompt, unknown_nodes
from PIL import Image
from safetensors.torch import load_file

WORKFLOWS = sorted(path.stem for path in (Path(__file__).parents[2] / "workflows").glob("*.json"))
EXPECTED = {
    "autoguidance",
    "concept-generation",
    "condition-decoupling",
    "decoupled-prompt",
    "drift-rectification",
    "gcfg-model-upscale",
    "inpaint-masked-concept",
    "multi-lora-composite",
    "negative-prompts-free-weights",
    "personalization-methods",
    "regions-loras-negatives",
    "sdxl",
    "several-conditions",
    "spatial-guided-controlnet",
    "stylised-control",
    "text-guided-concept",
    "three-for-two",
    "weight-sweep",
}
LARGE = {  # of models that the small world has none of: tests/nodes/test_large_workflows.py runs them
    "flux-negative-prompt",
    "ideogram4-two-models",
    "ltx2-audio-video",
    "wan22-high-low-noise",
    "zimage-text-and-style",
}
SAMPLERS = {"GCFGKSampler": 0, "KSampler": 0, "SamplerCustomAdvanced": 0, "GCFGWeightSweep": 2}  # output of latents
TITLE = 30  # a node's title bar stands above its position


def test_none_is_missing():
    assert set(WORKFLOWS) == EXPECTED | LARGE


@pytest.fixture
def fitting_workflow(client, load_workflow):
    """A shared workflow, for tests that need its nodes on the server."""

    def load(name):
        workflow = load_workflow(name)
        unknown = unknown_nodes(workflow, client.object_info)
        if unknown and name in LARGE:
            pytest.skip(f"{name}: this ComfyUI has no node {', '.join(unknown)}")
        return workflow

    return load


def box(node):
    (x, y), (w, h) = node["pos"], node["size"]
    return x, y - TITLE, x + w, y + h


@pytest.mark.parametrize("name", WORKFLOWS)
def test_is_laid_out_readably(load_workflow, name):
    workflow = load_workflow(name)
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    for (a, p), (b, q) in itertools.combinations(boxes.items(), 2):
        apart = p[2] <= q[0] or q[2] <= p[0] or p[3] <= q[1] or q[3] <= p[1]
        assert apart, f"nodes {a} and {b} overlap"
    frames = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in workflow["groups"])]
    for node in workflow["nodes"]:
        x0, y0, x1, y1 = boxes[node["id"]]
        inside = [f for f in frames if f[0] <= x0 and f[1] <= y0 and x1 <= f[2] and y1 <= f[3]]
        assert len(inside) == (node["type"] != "Note"), f"node {node['id']} is in {len(inside)} groups"
    notes = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "Note"]
    assert len(notes) == 1
    assert name == "sdxl" or name in LARGE or "paper" in notes[0] or "Appendix" in notes[0]
    for file in prompts.files_of(to_prompt_offline(workflow)):
        assert file in notes[0], f"the note does not say where {file} goes"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_has_a_thumbnail_for_the_template_browser(root, name):
    file = root / "workflows" / f"{name}.jpg"
    assert file.stat().st_size < 100_000
    with Image.open(file) as image:
        assert max(image.size) <= (1600 if name in LARGE else 512)  # a picture of the graph
        assert numpy.asarray(image).std() > 10


def to_prompt_offline(workflow):
    """The widget values only: enough to know the files a workflow names."""
    return {str(n["id"]): {"inputs": dict(enumerate(n.get("widgets_values") or []))} for n in workflow["nodes"]}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_fits_the_live_server(client, fitting_workflow, name):
    assert problems(fitting_workflow(name), client.object_info, files=name not in LARGE) == []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_keeps_its_own_widget_values(client, fitting_workflow, name):
    """Every widget value of the file reaches the prompt under the name of its widget, in range."""
    workflow = fitting_workflow(name)
    prompt = to_prompt(workflow, client.object_info)
    for node in workflow["nodes"]:
        if node["type"] == "GCFGGuidanceTerm":
            names = ("weight", "start_percent", "end_percent", "label", "curve", "end_weight", "points")
            inputs = prompt[str(node["id"])]["inputs"]
            assert [inputs[name] for name in (*names, "stream_weights")] == node["widgets_values"]
            assert inputs["label"]
        if node["type"] == "GCFGKSampler":
            seed, _, steps, sampler, scheduler, denoise = node["widgets_values"]
            inputs = prompt[str(node["id"])]["inputs"]
            assert (inputs["seed"], inputs["steps"], inputs["denoise"]) == (seed, steps, denoise)
            assert (inputs["sampler_name"], inputs["scheduler"]) == (sampler, scheduler)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_runs_and_makes_finite_changing_images(client, server, load_workflow, api_prompt, pixels, name):
    refusing = refusing_nodes(load_workflow(name), client.object_info)
    if refusing:
        pytest.skip(f"this ComfyUI is too old for {', '.join(refusing)}")
    prompt = api_prompt(name)
    samplers = [node for node, entry in prompt.items() if entry["class_type"] in SAMPLERS]
    for node in samplers:  # 8-bit images cannot show a NaN, latents can
        prompt[f"latent-{node}"] = {
            "class_type": "SaveLatent",
            "inputs": {
                "samples": [node, SAMPLERS[prompt[node]["class_type"]]],
                "filename_prefix": f"latents/{name}-{node}",
            },
        }
    run = client.run(prompt)
    assert len(run.images) == len(samplers)
    images = [pixels(run, i) for i in range(len(run.images))]
    for image in images:
        assert image.shape[1] == 64 or name in {"weight-sweep", "gcfg-model-upscale"}
        assert image.std() > 4
    alike = [pair for pair in itertools.combinations(images, 2) if pair[0].shape == pair[1].shape]
    for a, b in alike:  # side by side: they must not be the same picture
        assert numpy.abs(a.astype(int) - b).mean() > 1
    for node in samplers:
        (path,) = (server.work / "output" / "latents").glob(f"{name}-{node}_*.latent")
        latent = load_file(path)["latent_tensor"]
        assert latent.isfinite().all()
        assert latent.std() > 0.05


@pytest.mark.parametrize("name", ["several-conditions", "stylised-control", "regions-loras-negatives"])
def test_every_term_changes_the_image(client, api_prompt, pixels, name):
    """Switching any one term off gives another image: no term is decoration."""
    prompt = api_prompt(name)
    whole = pixels(client.run(prompt)).astype(int)
    for node, entry in prompt.items():
        if entry["class_type"] == "GCFGGuidanceTerm":
            without = pixels(client.run(with_inputs(prompt, node, weight=0.0)))
            assert numpy.abs(whole - without).mean() > 0.5, entry["inputs"]["label"]


def with_inputs(prompt, node, **inputs):
    return {**prompt, node: {**prompt[node], "inputs": {**prompt[node]["inputs"], **inputs}}}


def test_every_method_guides_with_its_own_file(client, server, api_prompt, node_of, pixels):
    """What a method's file holds decides that method's image and no other's; ComfyUI found a use for all of it."""
    before = len(server.log_file.read_text(encoding="utf-8", errors="replace"))
    prompt = prompts.translated(api_prompt("personalization-methods", steps=4))
    prior, lora = node_of(prompt, "CheckpointLoaderSimple"), node_of(prompt, "LoraLoaderModelOnly")
    term = {entry["inputs"]["label"]: node for node, entry in prompt.items() if "label" in entry["inputs"]}
    (word,) = [node for node, entry in prompt.items() if "embedding:" in str(entry["inputs"].get("text"))]
    without = {
        "dreambooth": with_inputs(prompt, term["dreambooth"], model=[prior, 0]),
        "lora": with_inputs(prompt, lora, strength_model=0.25),
        "textual-inversion": with_inputs(prompt, word, text="a photo of a"),
        "concept": with_inputs(prompt, term["concept"], model=[prior, 0]),
    }
    whole = pictures_of_methods(client, prompt, pixels)
    assert without.keys() == term.keys() == whole.keys()
    for method, changed in without.items():
        found = pictures_of_methods(client, changed, pixels)
        for other in whole:
            difference = numpy.abs(whole[other] - found[other]).mean()
            assert (difference > 1) if other == method else (difference == 0), (method, other, difference)
    said = server.log_file.read_text(encoding="utf-8", errors="replace")[before:].lower()
    assert "not loaded" not in said  # a key of the LoRA
    assert "does not exist" not in said  # the embedding


def pictures_of_methods(client, prompt, pixels):
    run = client.run(prompt)
    labels = [
        prompt[node]["inputs"]["filename_prefix"].partition("-methods-")[2]
        for node in run.outputs
        if "images" in run.outputs[node]
    ]
    return {label: pixels(run, i).astype(int) for i, label in enumerate(labels)}


def test_inpainting_keeps_what_the_mask_does_not_cover(client, api_prompt, pixels, node_of):
    prompt = api_prompt("inpaint-masked-concept")
    encode, decode = node_of(prompt, "VAEEncode"), node_of(prompt, "VAEDecode")
    plain = {k: v for k, v in prompt.items() if v["class_type"] not in ("GCFGKSampler", "GCFGGuidanceTerm")}
    plain[decode] = {**prompt[decode], "inputs": {**prompt[decode]["inputs"], "samples": [encode, 0]}}
    before, after = pixels(client.run(plain)).astype(int), pixels(client.run(prompt)).astype(int)
    changed = numpy.abs(before - after).mean(-1)
    lower = changed.shape[0] * 2 // 3
    assert changed[lower:].max() <= 4  # legs and lawn, far from the mask; the decoder looks a few latents around
    assert changed[: lower // 2].max() > 8  # the face
