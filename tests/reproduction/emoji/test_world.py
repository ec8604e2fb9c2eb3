"""The world's networks from the first stage to the last, a step or two of each, and a prior that was killed."""

import json

import pytest
import torch
from comfyui_gcfg.evaluation.config_file import load_config
from comfyui_gcfg.evaluation.images import Shard, write_shard
from comfyui_gcfg.evaluation.results import FORMAT
from comfyui_gcfg.reproduction.emoji import judge, learned_controlnet, learned_prior
from comfyui_gcfg.reproduction.emoji import world as module
from comfyui_gcfg.reproduction.emoji.evaluation import write_evaluation
from comfyui_gcfg.reproduction.emoji.held_out import distance, measure_held_out, truth_distance
from comfyui_gcfg.reproduction.emoji.judge import features, reads, second_reads
from comfyui_gcfg.reproduction.emoji.settings import World as Settings
from comfyui_gcfg.reproduction.emoji.settings import read_settings
from comfyui_gcfg.reproduction.emoji.stages import stages
from comfyui_gcfg.reproduction.emoji.things import HELD_OUT
from comfyui_gcfg.reproduction.emoji.world import World
from comfyui_gcfg.training.prior.model import open_prior
from PIL import Image
from safetensors.torch import load_file

FEW = Settings(
    variants=2,
    concept_variants=2,
    autoencoder_steps=2,
    decoder_steps=2,
    judge_steps=2,
    prior_steps=3,
    prior_learning_rate=1e-3,
    precision="bf16",
    compiled=False,
    style_steps=1,
    controlnet_steps=1,
    controlnet_learning_rate=1e-3,
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    for part in (learned_prior, learned_controlnet, judge):
        monkeypatch.setattr(part, "BATCH", 4)


def run(world):
    world.draw()
    world.train_autoencoder()
    world.train_prior()


def test_the_whole_way(cache, tmp_path):
    folder = tmp_path / "world"
    folder.mkdir()
    world = World(folder, FEW, cache)
    run(world)
    before = load_file(folder / "prior.safetensors")
    world.train_decoder()
    world.train_judges()
    world.train_style()
    world.train_controlnet()

    after = load_file(folder / "prior.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("first_stage_model.taesd_decoder.") for name in changed)
    prior = open_prior(folder / "prior.safetensors")
    assert prior.family == "sd1"
    assert prior.prediction == "eps"
    unet, ink = prior.load_unet(), open_prior(folder / "ink.safetensors").load_unet()
    assert any(not torch.equal(a, b) for a, b in zip(unet.parameters(), ink.parameters(), strict=True))
    assert (folder / "concepts" / "face" / "training").is_dir()

    pictures = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    assert features(folder / "judge.safetensors")(pictures).shape == (3, 128)
    for shows in (reads(folder / "judge.safetensors"), second_reads(folder / "second_judge.safetensors")):
        for label in ("tiger-face", "smiling", "on a blue background"):
            assert shows(pictures, label).dtype == torch.bool
    control = load_file(folder / "controlnet.safetensors")
    assert all(name.startswith("control_model.") for name in control)


def test_a_prior_that_is_killed_ends_as_one_that_is_not(cache, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run(World(whole, FEW, cache))

    class Killed(Exception):
        pass

    def train(network, loss, plan, state):
        if "prior" in state.name:
            calls = []

            def mortal(*arguments):
                calls.append(1)
                if len(calls) == 3:
                    raise Killed
                return loss(*arguments)

            return real(network, mortal, plan, state, seconds=0)
        return real(network, loss, plan, state)

    real = module.train
    monkeypatch.setattr(module, "train", train)
    with pytest.raises(Killed):
        run(World(broken, FEW, cache))
    monkeypatch.setattr(module, "train", real)
    World(broken, FEW, cache).train_prior()
    expected, found = (load_file(folder / "prior.safetensors") for folder in (whole, broken))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("preset", ["small", "long", "gpu"])
def test_presets_are_complete_and_every_method_has_its_stages(preset, tmp_path):
    settings = read_settings(preset)
    names = [stage.name for stage in stages(tmp_path, settings, tmp_path)]
    assert len(set(names)) == len(names)
    for concept in ("face", "animal"):
        for method in ("concept", "dreambooth", "custom_diffusion", "lora", "oft", "textual_inversion"):
            assert [name for name in names if name.startswith(f"train {concept} {method} ")] == [
                f"train {concept} {method} {seed}" for seed in settings.methods.seeds
            ]


@pytest.mark.parametrize("concept", ["face", "animal"])
def test_the_evaluation_of_a_concept_is_a_config(concept, tmp_path):
    """`gcfg evaluate` reads it, and asks for every held-out thing by its name and its label."""
    settings = read_settings("long")
    config = load_config(write_evaluation(tmp_path, settings, concept, 1))
    labels = [each.label for each in config.alignment.prompts]
    assert set(HELD_OUT[concept]) <= set(labels)
    assert {"smiling"} <= set(labels)
    assert all(each.prompt.split()[0] in ("a", "an") for each in config.alignment.prompts)
    assert config.models["dreambooth"].unet == f"methods/{concept}/dreambooth-1/dreambooth.safetensors"
    assert config.models["concept_zero"].unet == f"methods/{concept}/concept_zero-0/concept_zero.safetensors"
    assert config.sampling.seed == 1


def test_the_distance_to_the_truth_is_the_nearest_placement_s(tmp_path):
    """Features are the mean colours; computed by hand."""
    flat = lambda *colour: torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)  # noqa: E731
    truth = torch.stack([flat(0, 0, 0), flat(100, 0, 0)])
    images = torch.stack([flat(0, 0, 30), flat(100, 40, 0), flat(100, 0, 0)])
    found = distance(images, truth, lambda pictures: pictures.float().mean((2, 3)))
    assert found == pytest.approx((30 + 40 + 0) / 3)


def test_the_images_of_a_result_are_measured_by_both(tmp_path):
    """Made-up images of two prompts, one of them held out, in the files that `gcfg evaluate` writes."""
    evaluation, truth = tmp_path / "evaluation", tmp_path / "held-out"
    (evaluation / "results").mkdir(parents=True)
    (evaluation / "images" / "some").mkdir(parents=True)
    truth.mkdir()
    for name, value in (
        ("dog-00-white", 50),
        ("dog-01-blue", 90),
        ("dog-face-00-white", 200),
        ("dog-face-01-blue", 210),
    ):
        Image.new("RGB", (8, 8), (value,) * 3).save(truth / f"{name}.png")
    for prompt, values in enumerate(((50, 80), (7, 7))):
        pictures = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in values])
        write_shard(Shard(prompt, 0, 2).path(evaluation / "images" / "some"), pictures, 0, 1.0)
    result = {
        "format": FORMAT,
        "method": "ours",
        "images": "images/some",
        "details": [{"label": "dog"}, {"label": "smiling"}],
    }
    (evaluation / "results" / "alignment-ours.json").write_text(json.dumps(result))
    brightness = lambda pictures: pictures.float().mean((1, 2, 3))[:, None]  # noqa: E731
    found = measure_held_out(evaluation, truth, brightness, lambda pictures, label: brightness(pictures)[:, 0] > 60)
    assert found == {"ours": {"distance": 5.0, "alignment": 0.5, "second": 0.25}}
    assert truth_distance(truth, brightness) == (40 + 10) / 2
