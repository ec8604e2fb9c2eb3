"""What an untyped switch may pass on: nothing, or something else than the input takes."""

import inspect

import pytest
import torch
from comfyui_gcfg.gcfg.diagnostics import GuidanceReport
from comfyui_gcfg.gcfg.terms import GuidanceTerm
from comfyui_gcfg.testkit.checks import refusal


@pytest.fixture
def classes(comfy):
    from comfyui_gcfg.nodes import concept, guidance, guidance_cache, prompts, report, sampling, weight_sweep

    topics = (concept, guidance, prompts, guidance_cache, sampling, weight_sweep, report)
    return {node_id: node for topic in topics for node_id, _, node in topic.NODES}


@pytest.fixture
def good(prior, prompt, latent):
    """Values that a node of any class takes, by the input's name."""

    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens(self, tokens, return_pooled):
            return torch.zeros(1, 77, 768), torch.zeros(1, 768)

    class Vae:
        def decode(self, samples):
            return torch.zeros(len(samples), 16, 16, 3)

    term = GuidanceTerm(2.0, conditioning=prompt(1), label="a")
    return {
        **{"model": prior, "clip": Clip(), "vae": Vae(), "unconditional": prompt(0), "null_text": prompt(0)},
        **{"latent_image": latent, "terms": (term,), "term_1": (term,), "steps": 2, "end_at_step": 2},
        **{"label_1": "a", "text": "2 | a", "conditioning": prompt(1), "sampler_name": "euler", "scheduler": "normal"},
        "unet_name": "x.safetensors",
        "report": GuidanceReport(),
    }


def inputs_of(node, good, kinds):
    """Values for inputs of these kinds: the good one, else the widget's default."""
    found = {}
    for kind in kinds:
        for name, spec in node.INPUT_TYPES().get(kind, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            first = spec[0][0] if isinstance(spec[0], list) and spec[0] else None
            found[name] = good.get(name, options.get("default", first))
    return found


def message(node, **inputs):
    return refusal(getattr(node(), node.FUNCTION), **inputs)


REQUIRED = [
    ("GCFGKSampler", "model", "GCFG KSampler: model is empty, expected a model; connect a node that loads one."),
    (
        "GCFGKSampler",
        "unconditional",
        "GCFG KSampler: unconditional is empty, expected a prompt; connect a CLIP Text Encode node.",
    ),
    (
        "GCFGKSamplerAdvanced",
        "latent_image",
        "GCFG KSampler (Advanced): latent_image is empty, expected a latent image; connect an Empty Latent Image or a "
        "VAE Encode node.",
    ),
    ("GCFGKSampler", "steps", "GCFG KSampler: steps is empty, expected a whole number from 1 to 10000; correct it."),
    ("GCFGKSampler", "seed", "GCFG KSampler: seed is empty, expected a whole number; correct it."),
    ("GCFGKSampler", "denoise", "GCFG KSampler: denoise is empty, expected a number; connect a number, or type it."),
    (
        "GCFGKSamplerAdvanced",
        "add_noise",
        "GCFG KSampler (Advanced): add_noise is empty, expected one of enable, disable; choose one.",
    ),
    ("GCFGGuider", "model", "GCFG Guider: model is empty, expected a model; connect a node that loads one."),
    (
        "GCFGWeightSweep",
        "vae",
        "Weight Sweep: vae is empty, expected a VAE; connect a Load VAE node where the checkpoint holds none.",
    ),
    ("GCFGWeightSweep", "label_1", "Weight Sweep: label_1 is empty, expected text; connect text, or type it."),
    (
        "GCFGDecoupledPrompt",
        "clip",
        "Decoupled Prompt: clip is empty, expected a text encoder; connect a Load CLIP node where the checkpoint holds "
        "none.",
    ),
    ("GCFGDecoupledPrompt", "text", "Decoupled Prompt: text is empty, expected text; connect text, or type it."),
    ("GCFGNullTextPatch", "model", "Null-Text Patch: model is empty, expected a model; connect a node that loads one."),
    (
        "GCFGNullTextPatch",
        "null_text",
        "Null-Text Patch: null_text is empty, expected a prompt; connect a CLIP Text Encode node.",
    ),
    (
        "GCFGNullTextPatch",
        "mode",
        "Null-Text Patch: mode is empty, expected one of uniform_mean, attention_mean; choose one.",
    ),
    (
        "GCFGLoadConceptUNet",
        "unet_name",
        "Load Concept UNet: unet_name is empty, expected a name from its list; choose one.",
    ),
    (
        "GCFGGuidanceCache",
        "terms",
        "Guidance Cache: terms is empty, expected guidance terms; connect a Guidance Term node.",
    ),
    ("GCFGGuidanceTerm", "weight", "Guidance Term: weight is empty, expected a number; connect a number, or type it."),
    (
        "GCFGGuidanceReport",
        "report",
        "Guidance Report: report is empty, expected a report; connect the report output of a GCFG sampler or guider.",
    ),
]


@pytest.mark.parametrize(("node_id", "name", "expected"), REQUIRED)
def test_nothing_at_a_required_input(classes, good, node_id, name, expected):
    node = classes[node_id]
    given = inputs_of(node, good, ["required", "optional"])
    assert message(node, **{**given, name: None}) == expected
    assert message(node, **{other: value for other, value in given.items() if other != name}) == expected


def test_no_required_input_of_any_node_takes_nothing(classes, good):
    """All of them, in one sentence that names the input."""
    for node in classes.values():
        given = inputs_of(node, good, ["required", "optional"])
        for name in node.INPUT_TYPES()["required"]:
            assert f": {name} is empty, expected " in message(node, **{**given, name: None})


def same(one, other):
    """Whether two results are equal, tensors and terms in them too."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, GuidanceTerm):
        return same(list(vars(one).values()), list(vars(other).values()))
    return one is other or (type(one) is type(other) and (not isinstance(one, str | int | float) or one == other))


@pytest.mark.parametrize(
    "node_id",
    ["GCFGGuidanceTerm", "GCFGDecoupledPrompt", "GCFGKSampler", "GCFGKSamplerAdvanced", "GCFGWeightSweep"],
)
def test_nothing_at_optional_inputs_is_not_connected(classes, good, node_id):
    node = classes[node_id]
    given = inputs_of(node, good, ["required"])
    if "term_1" in node.INPUT_TYPES()["optional"]:
        given["term_1"] = good["term_1"]
    open_inputs = [name for name in node.INPUT_TYPES()["optional"] if name not in given]
    expected = getattr(node(), node.FUNCTION)(**given)
    assert open_inputs
    for name in open_inputs:
        assert same(getattr(node(), node.FUNCTION)(**given, **{name: None}), expected), name
    assert same(getattr(node(), node.FUNCTION)(**given, **dict.fromkeys(open_inputs)), expected)


@pytest.mark.parametrize(
    ("node_id", "changes", "expected"),
    [
        (
            "GCFGGuidanceTerm",
            {"weight": "7"},
            "Guidance Term: weight is '7', expected a number; connect a number, or type it.",
        ),
        (
            "GCFGGuidanceTerm",
            {"weight": 10**400},
            "Guidance Term: weight is of the type int, expected a number; connect a number, or type it.",
        ),
        (
            "GCFGGuidanceTerm",
            {"label": ["x"]},
            "Guidance Term: label is of the type list, expected text; connect text, or type it.",
        ),
        (
            "GCFGGuidanceTerm",
            {"mask": [1, 2]},
            "Guidance Term: mask is of the type list, expected a mask; connect a MASK output.",
        ),
        (
            "GCFGGuidanceTerm",
            {"terms": ["x"]},
            "Guidance Term: terms is of the type list, expected guidance terms; connect a Guidance Term node.",
        ),
        (
            "GCFGGuidanceTerm",
            {"conditioning": "a\ud83d"},
            r"Guidance Term: conditioning is 'a\ud83d', expected a prompt; connect a CLIP Text Encode node.",
        ),
        (
            "GCFGGuidanceTerm",
            {"curve": "spline"},
            "Guidance Term: curve is 'spline', expected one of constant, linear, cosine, points; choose one.",
        ),
        (
            "GCFGKSampler",
            {"latent_image": {"samples": None}},
            "GCFG KSampler: latent_image is of the type dict, expected a latent image; connect an Empty Latent Image "
            "or a VAE Encode node.",
        ),
        (
            "GCFGKSampler",
            {"steps": 0},
            "GCFG KSampler: steps is 0, expected a whole number from 1 to 10000; correct it.",
        ),
        (
            "GCFGKSampler",
            {"steps": 2.5},
            "GCFG KSampler: steps is 2.5, expected a whole number from 1 to 10000; correct it.",
        ),
        (
            "GCFGKSampler",
            {"denoise": float("nan")},
            "GCFG KSampler: denoise is nan, expected a number from 0 to 1; correct it.",
        ),
        (
            "GCFGKSampler",
            {"sampler_name": "x"},
            "GCFG KSampler: sampler_name is 'x', expected a name from its list; choose one.",
        ),
        (
            "GCFGWeightSweep",
            {"steps": 0},
            "Weight Sweep: steps is 0, expected a whole number from 1 to 10000; correct it.",
        ),
        ("GCFGGuider", {"model": 3}, "GCFG Guider: model is 3, expected a model; connect a node that loads one."),
        (
            "GCFGNullTextPatch",
            {"null_text": [[None, {}]]},
            "Null-Text Patch: null_text holds no text, expected (1, tokens, width); connect a CLIP Text Encode node "
            "with no text.",
        ),
        (
            "GCFGNullTextPatch",
            {"null_text": [["x", "y"]]},
            "Null-Text Patch: null_text is of the type list, expected a prompt; connect a CLIP Text Encode node.",
        ),
    ],
)
def test_something_else(classes, good, node_id, changes, expected):
    node = classes[node_id]
    terms = {"term_1": good["term_1"]} if "term_1" in node.INPUT_TYPES().get("optional", {}) else {}
    assert message(node, **{**inputs_of(node, good, ["required"]), **terms, **changes}) == expected


def test_every_input_of_every_node_refuses_what_it_is_not(classes, good):
    """An object of no kind at all: one sentence for each."""
    for node in classes.values():
        given = inputs_of(node, good, ["required"])
        declared = node.INPUT_TYPES()
        for name in [*declared["required"], *declared.get("optional", {})]:
            assert f": {name} is of the type object, expected " in message(node, **{**given, name: object()})


def test_a_negative_seed_from_another_node_is_taken_as_stock_nodes_do(classes, good):
    node = classes["GCFGKSampler"]
    node().sample(**{**inputs_of(node, good, ["required"]), "seed": -1, "term_1": good["term_1"]})


def test_functions_keep_their_parameters(classes):
    for node in classes.values():
        named = set(inspect.signature(getattr(node, node.FUNCTION)).parameters)
        assert set(node.INPUT_TYPES()["required"]) <= named
