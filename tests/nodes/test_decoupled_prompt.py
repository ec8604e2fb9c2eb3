"""Decoupled Prompt: the terms that CLIP Text Encode and Guidance Term would make of each line."""

import json
import sys

import pytest
import torch
from comfyui_gcfg.testkit.checks import refusal
from comfyui_gcfg.testkit.models import clip_l_state_dict, with_all_layers
from safetensors.torch import save_file

BEGIN = "expected weight | prompt, such as 7.5 | sunflower, or 5 @0-60% | in Van Gogh style"


@pytest.fixture(scope="module")
def clip(comfy, tmp_path_factory):
    """SD1.x's text encoder with random weights in two of its layers, and an embedding beside it."""
    folder = tmp_path_factory.mktemp("clip")
    save_file(with_all_layers(clip_l_state_dict(dtype=torch.float16, layers=2)), folder / "clip.safetensors")
    vectors = torch.randn(2, 768, generator=torch.Generator().manual_seed(1))
    save_file({"clip_l": vectors}, folder / "sunny.safetensors")
    with torch.inference_mode():
        return comfy.sd.load_clip([str(folder / "clip.safetensors")], embedding_directory=str(folder))


@pytest.fixture
def node(comfy):
    from comfyui_gcfg.nodes.prompts import GCFGDecoupledPrompt

    return GCFGDecoupledPrompt()


@pytest.fixture
def by_hand(clip, comfy):
    """A line as two stock-style nodes make it."""
    from comfyui_gcfg.nodes.guidance import GCFGGuidanceTerm

    def make(weight, text, start=0.0, end=1.0, **more):
        (conditioning,) = sys.modules["nodes"].CLIPTextEncode().encode(clip, text)
        return GCFGGuidanceTerm().make(weight, start, end, conditioning=conditioning, label=text, **more)[0][-1]

    return make


def same(got, expected):
    """Whether two terms are the same but for their identity."""
    for name, value in vars(expected).items():
        if name != "conditioning":
            assert getattr(got, name) == value, name
    assert len(got.conditioning) == len(expected.conditioning)
    for (tokens, options), (wanted, others) in zip(got.conditioning, expected.conditioning, strict=True):
        assert torch.equal(tokens, wanted)
        assert options.keys() == others.keys()
        for key, other in others.items():
            equal = torch.equal(options[key], other) if isinstance(other, torch.Tensor) else options[key] == other
            assert equal, key
    return True


def test_terms_are_those_made_by_hand(node, clip, by_hand, concept):
    text = "# a painting\n7.5 | sunflower\n\n5 @0-60% | in Van Gogh style\n-2 | blurry\n"
    (first,) = [by_hand(1.5, "before")]
    (got,) = node.make(clip, text, model=concept, terms=(first,))
    assert got[0] is first
    expected = [
        by_hand(7.5, "sunflower", model=concept),
        by_hand(5.0, "in Van Gogh style", 0.0, 0.6, model=concept),
        by_hand(-2.0, "blurry", model=concept),
    ]
    assert len(got) == 1 + len(expected)
    assert all(map(same, got[1:], expected))
    assert got[1].model is concept
    assert not torch.equal(got[1].conditioning[0][0], got[2].conditioning[0][0]), "the encoder sees the text"


@pytest.mark.parametrize(
    "prompt",
    [
        "(sunflower:1.2)",
        "((sunflower)), (a vase:0.5)",
        "embedding:sunny",
        "a (embedding:sunny:1.3) flower",
        r"\(not a weight\)",
        "a | b",
        "7.5 @ home",
        "# no comment",
    ],
)
def test_comfyuis_own_syntax_reaches_the_encoder(node, clip, by_hand, prompt):
    (got,) = node.make(clip, f"3 | {prompt}")[0]
    assert same(got, by_hand(3.0, prompt))


@pytest.mark.parametrize(("one", "other"), [("(sunflower:1.2)", "sunflower"), ("embedding:sunny", "embedding:dull")])
def test_weights_and_embeddings_change_the_encoding(node, clip, one, other):
    (first, second) = node.make(clip, f"3 | {one}\n3 | {other}")[0]
    assert not torch.equal(first.conditioning[0][0], second.conditioning[0][0])


def test_a_sampler_takes_the_terms(node, clip, by_hand, gcfg, prior, latent):
    text = "3 | sunflower\n2 @0-50% | in Van Gogh style\n-1 | blurry"
    unconditional = by_hand(1.0, "").conditioning
    hand = [by_hand(3.0, "sunflower"), by_hand(2.0, "in Van Gogh style", 0.0, 0.5), by_hand(-1.0, "blurry")]
    got = gcfg(prior, unconditional, node.make(clip, text)[0], latent, steps=2)
    assert torch.equal(got, gcfg(prior, unconditional, hand, latent, steps=2))
    assert not torch.equal(got, gcfg(prior, unconditional, hand[:2], latent, steps=2))


def test_long_prompts_are_named_by_their_beginning(node, clip):
    prompt = "a sunflower in a vase on a table in the sun"
    (term,) = node.make(clip, f"3 | {prompt}")[0]
    assert term.label == "a sunflower in a vase on a tabl…"
    assert len(term.label) == 32
    assert prompt.startswith(term.label[:-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sunflower", f"line 1: {BEGIN}; found 'sunflower'."),
        ("1 | a\n\n5 @60-0% | x", "line 3: expected 0 <= start <= end <= 100 in @start-end%; found '@60-0%'."),
        (
            "900 | x\n3 |",
            "line 1: expected a weight from -100 to 100; found 900.; "
            f"line 2: expected a prompt after |; found nothing. {BEGIN.capitalize()}.",
        ),
        ("", f"no line, {BEGIN}."),
        ("# only a comment\n \n", f"no line, {BEGIN}."),
    ],
)
def test_bad_text_is_refused_before_and_while_it_runs(node, clip, text, message):
    assert type(node).VALIDATE_INPUTS(text) == message
    assert refusal(node.make, clip, text) == f"Decoupled Prompt: text, {message}"


def test_good_text_and_text_that_is_not_known_yet_are_let_through(node):
    assert type(node).VALIDATE_INPUTS("7.5 | sunflower") is True
    assert type(node).VALIDATE_INPUTS(None) is True, "another node makes it"


def test_without_a_text_encoder(node):
    assert refusal(node.make, None, "7.5 | sunflower") == (
        "Decoupled Prompt: clip is empty, expected a text encoder; connect a Load CLIP node where the checkpoint "
        "holds none."
    )


# --- what the editor asks while a user types ---


@pytest.fixture
def routes(comfy):
    from comfyui_gcfg.nodes.runtime import routes

    return routes


def test_the_editor_gets_the_parsers_words(routes, node):
    text = "7.50 | sunflower\n\nx | y"
    assert routes.check_prompt({"text": text}) == {
        "lines": ["7.5 | sunflower"],
        "problems": [{"line": 3, "message": f"{BEGIN}; found 'x | y'."}],
    }
    assert type(node).VALIDATE_INPUTS(text) == f"line 3: {BEGIN}; found 'x | y'."


def test_no_text_is_no_line(routes):
    assert routes.check_prompt({}) == {"lines": [], "problems": []}


def widgets(**changes):
    own = {"weight": 8, "start_percent": 0.25, "end_percent": 0.75, "curve": "linear", "end_weight": 0, "points": ""}
    return {**own, **changes}


def test_the_curve_preview_is_what_is_used(routes):
    weights = routes.weight_curve(widgets())["weights"]
    assert len(weights) == 101
    assert weights[24] == weights[76] == 0.0
    assert weights[25:76] == pytest.approx([8 - 0.16 * n for n in range(51)])
    old = {"weight": 2, "start_percent": 0, "end_percent": 1}  # a workflow of the time before curves
    assert routes.weight_curve(old) == {"weights": [2.0] * 101}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"curve": "points", "points": "0: x"},
            "Guidance Term: points: pair 1 is '0: x', expected percent: weight, such as 0.5: 3; correct it.",
        ),
        (
            {"curve": "spline"},
            "Guidance Term: curve is 'spline', expected one of constant, linear, cosine, points; choose one.",
        ),
        (
            {"start_percent": 0.9},
            "Guidance Term: start_percent is 0.9 and end_percent is 0.75, expected start_percent <= end_percent; swap "
            "them.",
        ),
        (
            {"weight": 1e308},
            "Guidance Term: weight is 1e+308, expected a number from -100 to 100; type one, such as 1.5.",
        ),
    ],
)
def test_the_curve_preview_of_bad_widgets(routes, changes, error):
    assert routes.weight_curve(widgets(**changes)) == {"error": error}


CURVE = json.dumps(widgets())
NOTHING = "expected a JSON object of at most 262144 bytes."


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("prompt", b"", NOTHING),
        ("prompt", b"{", NOTHING),
        ("prompt", b"[]", NOTHING),
        ("prompt", b"null", NOTHING),
        ("prompt", b'{"text": "\xff"}', NOTHING),
        ("prompt", b"[" * 100_000, NOTHING),
        ("prompt", b'{"text":' * 30_000, NOTHING),
        ("prompt", b'{"text": null}', "text is empty, expected text."),
        ("prompt", b'{"text": 3}', "text is a number, expected text."),
        ("prompt", b'{"text": ["x"]}', "text is a list, expected text."),
        ("curve", b"{}", "weight is empty, expected a number."),
        ("curve", CURVE.replace('"weight": 8', '"weight": NaN').encode(), NOTHING),
        (
            "curve",
            CURVE.replace('"weight": 8', '"weight": true').encode(),
            "weight is true or false, expected a number.",
        ),
        ("curve", CURVE.replace('"weight": 8', '"weight": {}').encode(), "weight is an object, expected a number."),
        ("curve", CURVE.replace('"weight": 8', '"weight": "8"').encode(), "weight is text, expected a number."),
        ("curve", CURVE.replace('"points": ""', '"points": []').encode(), "points is a list, expected text."),
    ],
)
def test_a_question_that_is_none_is_a_sentence(routes, path, data, message):
    answer = {"prompt": routes.check_prompt, "curve": routes.weight_curve}[path]
    assert routes.answered(f"/gcfg/{path}", answer, data) == ({"error": f"/gcfg/{path}: {message}"}, 400)


def test_a_long_integer_is_read_in_no_time(routes):
    """Python reads the digits of an integer in quadratic time, or not at all."""
    data = CURVE.replace('"weight": 8', '"weight": ' + "9" * 200_000).encode()
    assert routes.answered("/gcfg/curve", routes.weight_curve, data) == (
        {"error": "Guidance Term: weight is inf, expected a number from -100 to 100; type one, such as 1.5."},
        200,
    )


def test_half_a_character_is_named_and_never_sent(routes, node):
    text = "7 | a\ud83d"
    found, status = routes.answered("/gcfg/prompt", routes.check_prompt, json.dumps({"text": text}).encode())
    problem = r"expected whole characters; found \ud83d, half of one; delete it."
    assert (found, status) == ({"lines": [], "problems": [{"line": 1, "message": problem}]}, 200)
    assert type(node).VALIDATE_INPUTS(text) == f"line 1: {problem}"
