"""The attribute predictor on images whose attributes are known, and CLIP's numbers against transformers' own."""

import json

import pytest
import torch
from comfyui_gcfg.evaluation.metrics.alignment import TABLE3, Clip, clip_score, load_classifier, load_clip, zero_shot
from comfyui_gcfg.gcfg.errors import GuidanceError
from PIL import Image
from torch import nn
from transformers import BatchEncoding, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

COLOURS = ["red", "green", "blue"]


def plain(*colours):
    images = torch.zeros(len(colours), 3, 8, 8, dtype=torch.uint8)
    for image, colour in zip(images, colours, strict=True):
        image[COLOURS.index(colour)] = 200
    return images


class ColourClip(nn.Module):
    """A CLIP that knows what a colour is: both towers give its share of red, green and blue."""

    device = torch.device("cpu")

    def get_image_features(self, pixels):
        return pixels.mean((2, 3))

    def get_text_features(self, input_ids):
        return nn.functional.one_hot(input_ids[:, 0], 3).float() * 5  # any length


def colour_words(images=None, text=None, **_):
    if text is not None:
        words = [next(i for i, colour in enumerate(COLOURS) if colour in each) for each in text]
        return BatchEncoding({"input_ids": torch.tensor(words)[:, None]})
    return {"pixel_values": torch.stack(images).float()}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of two small towers with random weights, in Hugging Face's files."""
    folder = tmp_path_factory.mktemp("clip")
    letters = list(bytes_to_unicode().values())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(6)
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_factor": 5.0},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    prepare = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(prepare, CLIPTokenizer(folder / "vocab.json", folder / "merges.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def noise():
    """Images of different colours, so that CLIP tells them apart."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(70, 3, 1, 1, generator=generator)
    return (colours * torch.rand(70, 3, 40, 40, generator=generator) * 256).byte()


def test_an_attribute_is_there_where_its_text_is_nearer_than_the_opposite():
    label = "a red thing | a blue thing"
    holds = zero_shot(Clip(ColourClip(), colour_words), [label])
    images = plain("red", "blue", "red", "blue", "blue")
    assert holds(images, label).tolist() == [True, False, True, False, False]
    assert holds(images, label).dtype == torch.bool


def test_of_several_opposites_one_is_enough_to_deny():
    two, three = "red | blue", "red | blue | green"
    holds = zero_shot(Clip(ColourClip(), colour_words), [two, three])
    image = plain("green")
    image[:, 0] = 100  # more green than red, and no blue
    assert (holds(image, two).item(), holds(image, three).item()) == (True, False)


def test_the_predictor_says_what_transformers_own_clip_says(clip_folder, noise):
    texts = ["glasses", "none of them", "a hat"]
    holds = load_classifier("clip", clip_folder, [" | ".join(texts)])
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in noise]
    with torch.no_grad():
        logits = model(**processor(texts, pictures, return_tensors="pt", padding=True)).logits_per_image
    answers = [holds(noise, " | ".join(texts))]
    for first in (1, 2):
        order = [texts[first], *(text for text in texts if text != texts[first])]
        answers.append(load_classifier("clip", clip_folder, [" | ".join(order)])(noise, " | ".join(order)))
    assert torch.equal(torch.stack(answers).int().argmax(0), logits.argmax(1))
    assert (torch.stack(answers).sum(0) == 1).all()
    assert len(logits.argmax(1).unique()) > 1


def test_the_clip_score_is_a_hundred_times_the_cosine(clip_folder, noise):
    prompts = ["a red hat" if index % 2 else "glasses" for index in range(len(noise))]
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in noise]
    with torch.no_grad():
        out = model(**processor(prompts, pictures, return_tensors="pt", padding=True))
    expected = 100 * nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).mean().item()
    assert expected > 0.5
    assert clip_score(noise, prompts, load_clip("alignment.clip", clip_folder)) == pytest.approx(expected, abs=1e-3)


def test_table_3_is_the_papers_and_clip_can_tell_it(clip_folder):
    prompts, labels = zip(*TABLE3, strict=True)
    assert prompts == (
        *("wearing glasses", "wearing sunglasses", "wearing hat", "smiling", "male", "female"),
        *("white people", "black people", "asian people", "square face"),
    )
    holds = load_classifier("clip", clip_folder, labels)
    for label in labels:
        assert holds(plain("red"), label).shape == (1,)


class Brightness(nn.Module):
    """A classifier of one's own: is the image of the label's colour?"""

    def __init__(self, weights=None):
        super().__init__()
        self.weights = weights

    def forward(self, images, label):
        return images.float().mean((2, 3)).argmax(1) == COLOURS.index(label)


def wrong(_weights):
    return lambda images, label: images.float().mean()


@pytest.fixture
def own(monkeypatch):
    """This file as an importable module."""
    import sys
    import types

    module = types.ModuleType("own_networks")
    module.brightness, module.wrong, module.number = Brightness, wrong, lambda weights: 3
    monkeypatch.setitem(sys.modules, "own_networks", module)


@pytest.mark.usefixtures("own")
def test_a_classifier_of_ones_own_is_found_by_its_name():
    holds = load_classifier("own_networks:brightness", None, ["red"])
    assert holds(plain("red", "green"), "red").tolist() == [True, False]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_networks:number", "alignment.classifier 'own_networks:number' returned a int, expected a function"),
        ("blip", "alignment.classifier is 'blip', expected 'package.module:factory'"),
    ],
)
def test_a_wrong_classifier_is_told(name, message):
    with pytest.raises(GuidanceError, match=message):
        load_classifier(name, None, ["red"])


@pytest.mark.usefixtures("own")
def test_an_answer_that_is_none_is_told():
    with pytest.raises(GuidanceError, match=r"gave torch.float32 of shape \(\) for 2 images, expected torch.bool of"):
        load_classifier("own_networks:wrong", None, ["red"])(plain("red", "green"), "red")


@pytest.mark.parametrize("label", ["smiling", "smiling |", " | serious"])
def test_a_label_without_opposite_is_told(clip_folder, label):
    with pytest.raises(GuidanceError, match=r"alignment.prompts: label .* expected 'ATTRIBUTE \| OPPOSITE'"):
        load_classifier("clip", clip_folder, [label])


def test_a_clip_that_is_not_there_is_told(tmp_path):
    for folder, message in ((None, "is empty"), (tmp_path / "gone", "is '.*gone'"), (tmp_path, f"is '{tmp_path}'")):
        with pytest.raises(GuidanceError, match=f"alignment.clip {message}, expected a local folder of a whole CLIP"):
            load_clip("alignment.clip", folder)
