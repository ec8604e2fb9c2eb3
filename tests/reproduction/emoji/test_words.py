"""Captions are true, things are what the tables say, and a short prompt is the long one."""

import numpy as np
import pytest
import torch
from comfyui_gcfg.reproduction import text
from comfyui_gcfg.reproduction.emoji.captions import BACKGROUNDS, draw_caption, whole
from comfyui_gcfg.reproduction.emoji.learned_prior import new_unet
from comfyui_gcfg.reproduction.emoji.prompts import Prompts, read_short_text
from comfyui_gcfg.reproduction.emoji.things import ATTRIBUTES, GROUPS, HELD_OUT, things
from comfyui_gcfg.reproduction.emoji.vendors import LOOKS
from comfyui_gcfg.testkit.word_encoder import word_encoder
from comfyui_gcfg.training.prior.text_encoder import encode_prompt
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def world():
    return {thing.name: thing for thing in things()}


def test_the_tables_agree(world):
    assert len(world) == sum(len(names) for names in GROUPS.values())  # no thing in two groups
    for group, names in HELD_OUT.items():
        assert set(names) < set(GROUPS[group])
        assert all(world[name].held_out for name in names)
    assert sum(thing.held_out for thing in world.values()) == sum(len(names) for names in HELD_OUT.values())
    for attribute, names in ATTRIBUTES.items():
        assert set(names) <= set(world), attribute


def test_things_in_words(world):
    words = [world[name].words for name in ("owl", "unicorn", "dog-face", "cherries", "star-struck", "exploding-head")]
    assert words == ["an owl", "a unicorn", "a dog face", "cherries", "a star struck face", "an exploding head"]
    descriptions = world["winking-face-with-tongue"].descriptions
    assert descriptions == ("a face with tongue out", "a winking face")
    assert world["angry-face-with-horns"].descriptions == ("an angry face", "a face with horns", "a purple face")


def test_every_caption_is_true_of_its_picture(world):
    """Whatever of the world's words stands in a caption belongs to the thing, its look or its background."""
    rng = np.random.default_rng(0)
    grounds, complete = {f"on a {name} background" for name in BACKGROUNDS}, 0
    for name, look, background in (("crying-cat", "Noto", "pink"), ("green-apple", "Blob", "blue")):
        thing = world[name]
        true = {thing.words, *thing.descriptions, f"{look} style", f"on a {background} background"}
        true |= {"a picture of an animal"} if thing.group == "animal" else {"a picture of food"}
        seen = set()
        for _ in range(600):
            caption = draw_caption(thing, look, background, rng)
            parts = caption.split(", ")
            assert set(parts) <= true
            assert not set(parts) & (grounds - {f"on a {background} background"})
            seen |= set(parts)
            complete += caption == whole(thing.words, look, background)
        assert seen == true
    assert complete > 100


PROMPTS = ["", "a tiger face, Twemoji style, on a blue background", "an owl"]


def test_the_trainer_reads_the_text_encoder_alike_and_its_padding_is_one_vector(tmp_path):
    save_file(
        {f"cond_stage_model.transformer.{name}": w for name, w in word_encoder().items()}, tmp_path / "clip.safetensors"
    )
    prompts = Prompts()
    for prompt in PROMPTS:
        long = encode_prompt(tmp_path / "clip.safetensors", "sd1", prompt, "the file", text.tokenizer()).context[0]
        short, bias = prompts.short([prompt])
        assert short.shape[1] % 8 == 0
        count = int(bias[0, 0, 1:].isfinite().sum())
        torch.testing.assert_close(short[0, 1 : count + 1], long[:count], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(short[0, :1].expand(77 - count, -1), long[count:], rtol=1e-5, atol=1e-5)


def test_the_order_of_words_shows():
    prompts = Prompts()
    (a, b), _ = prompts.short(["a red tiger on a blue background", "a blue tiger on a red background"])
    assert (a[3] - b[3]).norm() > 0.3 * a[3].norm() / 4  # the word tiger, after red and after blue
    similar = torch.nn.functional.cosine_similarity(a[3], b[7], dim=0)  # red, early and late
    assert 0.7 < similar < 0.999


def test_a_unet_reads_a_short_prompt_as_the_long_one():
    torch.manual_seed(0)
    unet = new_unet().eval()
    x, t = torch.randn(3, 4, 12, 12), torch.tensor([0, 500, 999])
    long = text.encode(word_encoder(), PROMPTS)
    with torch.no_grad():
        expected = unet(x, t, encoder_hidden_states=long).sample
        tokens, bias = Prompts().short(PROMPTS)
        assert tokens.shape[1] == 16
        read_short_text(unet).bias = bias
        found = unet(x, t, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected[1] - expected[2]).std() > 0.01


def test_looks_have_names_of_their_own():
    assert len({look.lower() for look in LOOKS}) == len(LOOKS)
