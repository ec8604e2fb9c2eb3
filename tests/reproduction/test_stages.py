"""The stages with the real trainer, at a size of seconds: each runs once, and a second command goes on."""

import json

import pytest
import torch
from comfyui_gcfg.evaluation.config_file import load_config
from comfyui_gcfg.gcfg.concept_file import describe
from comfyui_gcfg.gcfg.safetensors_file import LazyStateDict
from comfyui_gcfg.reproduction.methods import METHODS
from comfyui_gcfg.reproduction.publish import publish
from comfyui_gcfg.reproduction.settings import read_settings
from comfyui_gcfg.reproduction.stages import STAGES, run_stages, stages
from comfyui_gcfg.testkit import small_world
from safetensors.torch import load_file

TINY = """
[world]
pictures = 12
autoencoder_steps = 2
classifier_steps = 2
prior_steps = 2
prior_batch = 4
prior_learning_rate = 1e-3
controlnet_steps = 2
controlnet_learning_rate = 1e-3
[methods]
steps = 1
batch_size = 2
precision = "fp32"
[evaluation]
steps = 1
fid_count = 70
fid_search_count = 65
per_prompt = 7
search_per_prompt = 7
conditions = 2
per_condition = 1
search_conditions = 1
per_cell = 65
diversity_per_prompt = 2
sweep_concept = [0.5, 1.0]
sweep_control = [0.0, 2.0]
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "tiny.toml"
    path.write_text(TINY)
    return read_settings(str(path))


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    """A folder in which all has run that comes before the evaluation, but with a few scans only."""
    from comfyui_gcfg.reproduction import scans, world

    patch = pytest.MonkeyPatch()
    few = tuple(part[:40] for part in scans.read_scans())
    for module in (scans, world):
        patch.setattr(module, "read_scans", lambda: few)
    patch.setattr(scans, "TRAINING", 30)
    folder = tmp_path_factory.mktemp("world")
    try:
        for stage in stages(folder, settings, None):
            if stage.name.startswith("evaluate"):
                break
            stage.run()
    finally:
        patch.undo()
    return folder


def test_every_method_of_the_tables_is_trained(trained, settings):
    config = load_config(trained / "evaluation.toml") if (trained / "evaluation.toml").exists() else None
    assert config is None  # the evaluation has not begun
    for name in METHODS:
        (file,) = [
            p
            for p in (trained / "methods" / name).glob("*.safetensors")
            if "lora-" not in p.name and "-lora" not in p.name
        ]
        assert file.name == f"{name}.safetensors"
    concept = LazyStateDict(trained / "methods" / "concept" / "concept.safetensors")
    assert describe(concept).form == "folded"


def test_the_evaluation_names_what_was_trained(trained, settings, tmp_path):
    """Every model and file of the evaluation's config is there."""
    from comfyui_gcfg.reproduction.stages import _evaluation

    config = load_config(_evaluation(trained, settings))
    (trained / "evaluation.toml").unlink()
    for model in config.models.values():
        assert config.path(model.unet or model.embedding).is_file()
    for setting in (config.prior.checkpoint, config.prior.controlnet, config.fid.extractor_weights):
        assert config.path(setting).is_file()
    assert set(METHODS) == {"concept" if name == "ours" else name for name in config.models}


def test_published_models_are_the_trained_ones(trained, tmp_path, monkeypatch):
    publish(trained, tmp_path)
    prior = load_file(trained / "prior.safetensors")
    monkeypatch.setattr(small_world, "TRAINED", tmp_path)
    clip = small_world.clip()  # made anew
    own = {name: w for name, w in prior.items() if name.startswith("cond_stage_model.transformer.text_model.")}
    assert len(own) == 2 * 16 + 4
    for name, tensor in own.items():
        found = clip[name.removeprefix("cond_stage_model.transformer.")]
        torch.testing.assert_close(found.float(), tensor, rtol=1e-3, atol=1e-4)
    for name, tensor in load_file(tmp_path / "prior.safetensors").items():
        torch.testing.assert_close(tensor.float(), prior[f"model.diffusion_model.{name}"], rtol=1e-3, atol=1e-6)
    for name, file in (("lora", "lora-lora"), ("textual_inversion", "textual_inversion")):  # half precision already
        own = load_file(trained / "methods" / name / f"{file}.safetensors")
        published = load_file(tmp_path / f"{name}.safetensors")
        assert published.keys() == own.keys()
        assert all(torch.equal(published[key], own[key]) for key in own)
    assert published["emb_params"].shape == (1, 768)
    assert {path.name for path in tmp_path.iterdir()} >= {"concept.safetensors", "controlnet.safetensors", "scan.png"}


def test_what_is_done_is_not_done_again(settings, tmp_path, monkeypatch):
    """A failing stage ends the command; the next command starts with it."""
    from comfyui_gcfg.reproduction import stages as module

    ran, broken = [], [True]

    def fake(folder, settings, page):
        for name in ("first", "second", "third"):
            yield module.Stage(name, lambda name=name: run(name))

    def run(name):
        ran.append(name)
        if name == "second" and broken.pop():
            raise RuntimeError("power cut")

    monkeypatch.setattr(module, "stages", fake)
    with pytest.raises(RuntimeError):
        run_stages(tmp_path, settings)
    broken.append(False)
    run_stages(tmp_path, settings)
    assert ran == ["first", "second", "second", "third"]
    assert list(json.loads((tmp_path / STAGES).read_text())) == ["first", "second", "third"]
