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
    return {title: node for topic in topics for _, title, node in topic.NODES}


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


# What each kind of input expects, as its sentence ends.
MODEL = "a model; connect a node that loads one."
PROMPT = "a prompt; connect a CLIP Text Encode node."
LATENT = "a latent image; connect an Empty Latent Image or a VAE Encode node."
VAE = "a VAE; connect a Load VAE node where the checkpoint holds none."
CLIP = "a text encoder; connect a Load CLIP node where the checkpoint holds none."
TERMS = "guidance terms; connect a Guidance Term node."
REPORT = "a report; connect the report output of a GCFG sampler or guider."
TEXT = "text; connect text, or type it."
NUMBER = "a number; connect a number, or type it."
STEPS = "a whole number from 1 to 10000; correct it."
NAME = "a name from its list; choose one."


@pytest.mark.parametrize(
    ("title", "name", "expected"),
    [
        ("GCFG KSampler", "model", MODEL),
        ("GCFG KSampler", "unconditional", PROMPT),
        ("GCFG KSampler (Advanced)", "latent_image", LATENT),
        ("GCFG KSampler", "steps", STEPS),
        ("GCFG KSampler", "seed", "a whole number; correct it."),
        ("GCFG KSampler", "denoise", NUMBER),
        ("GCFG KSampler (Advanced)", "add_noise", "one of enable, disable; choose one."),
        ("GCFG Guider", "model", MODEL),
        ("Weight Sweep", "vae", VAE),
        ("Weight Sweep", "label_1", TEXT),
        ("Decoupled Prompt", "clip", CLIP),
        ("Decoupled Prompt", "text", TEXT),
        ("Null-Text Patch", "model", MODEL),
        ("Null-Text Patch", "null_text", PROMPT),
        ("Null-Text Patch", "mode", "one of uniform_mean, attention_mean; choose one."),
        ("Load Concept UNet", "unet_name", NAME),
        ("Guidance Cache", "terms", TERMS),
        ("Guidance Term", "weight", NUMBER),
        ("Guidance Report", "report", REPORT),
    ],
)
def test_nothing_at_a_required_input(classes, good, title, name, expected):
    node, sentence = classes[title], f"{title}: {name} is empty, expected {expected}"
    given = inputs_of(node, good, ["required", "optional"])
    assert message(node, **{**given, name: None}) == sentence
    assert message(node, **{other: value for other, value in given.items() if other != name}) == sentence


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
    "title", ["Guidance Term", "Decoupled Prompt", "GCFG KSampler", "GCFG KSampler (Advanced)", "Weight Sweep"]
)
def test_nothing_at_optional_inputs_is_not_connected(classes, good, title):
    node = classes[title]
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
    ("title", "name", "value", "found", "expected"),
    [
        ("Guidance Term", "weight", "7", "is '7'", NUMBER),
        ("Guidance Term", "weight", 10**400, "is of the type int", NUMBER),
        ("Guidance Term", "label", ["x"], "is of the type list", TEXT),
        ("Guidance Term", "mask", [1, 2], "is of the type list", "a mask; connect a MASK output."),
        ("Guidance Term", "terms", ["x"], "is of the type list", TERMS),
        ("Guidance Term", "conditioning", "a\ud83d", r"is 'a\ud83d'", PROMPT),
        ("Guidance Term", "curve", "spline", "is 'spline'", "one of constant, linear, cosine, points; choose one."),
        ("GCFG KSampler", "latent_image", {"samples": None}, "is of the type dict", LATENT),
        ("GCFG KSampler", "steps", 0, "is 0", STEPS),
        ("GCFG KSampler", "steps", 2.5, "is 2.5", STEPS),
        ("GCFG KSampler", "denoise", float("nan"), "is nan", "a number from 0 to 1; correct it."),
        ("GCFG KSampler", "sampler_name", "x", "is 'x'", NAME),
        ("Weight Sweep", "steps", 0, "is 0", STEPS),
        ("GCFG Guider", "model", 3, "is 3", MODEL),
        (
            *("Null-Text Patch", "null_text", [[None, {}]], "holds no text"),
            "(1, tokens, width); connect a CLIP Text Encode node with no text.",
        ),
        ("Null-Text Patch", "null_text", [["x", "y"]], "is of the type list", PROMPT),
    ],
)
def test_something_else(classes, good, title, name, value, found, expected):
    node = classes[title]
    terms = {"term_1": good["term_1"]} if "term_1" in node.INPUT_TYPES().get("optional", {}) else {}
    given = {**inputs_of(node, good, ["required"]), **terms, name: value}
    assert message(node, **given) == f"{title}: {name} {found}, expected {expected}"


def test_every_input_of_every_node_refuses_what_it_is_not(classes, good):
    """An object of no kind at all: one sentence for each."""
    for node in classes.values():
        given = inputs_of(node, good, ["required"])
        declared = node.INPUT_TYPES()
        for name in [*declared["required"], *declared.get("optional", {})]:
            assert f": {name} is of the type object, expected " in message(node, **{**given, name: object()})


def test_a_negative_seed_from_another_node_is_taken_as_stock_nodes_do(classes, good):
    node = classes["GCFG KSampler"]
    node().sample(**{**inputs_of(node, good, ["required"]), "seed": -1, "term_1": good["term_1"]})


def test_functions_keep_their_parameters(classes):
    for node in classes.values():
        named = set(inspect.signature(getattr(node, node.FUNCTION)).parameters)
        assert set(node.INPUT_TYPES()["required"]) <= named
