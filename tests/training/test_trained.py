"""From a run's folder to its model file."""

import errno
import json

import pytest
import torch
from comfyui_gcfg.command.main import app
from comfyui_gcfg.gcfg.concept_file import describe, features
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm
from comfyui_gcfg.training import checkpoints, learner
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.data.shards import Latents, Recipe, vae_fingerprint
from comfyui_gcfg.training.run import train
from comfyui_gcfg.training.stream import SampleStream
from comfyui_gcfg.training.trained import export_run
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def run(tmp_path_factory, checkpoint, digits, cache, write_config):
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, checkpoint, digits, cache, train={"steps": 3})
    train(load_config(config))
    return folder / "run"


def export(*arguments):
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return load_file(done.stdout.strip())


def test_a_finished_run_has_its_file(run):
    automatic = load_file(run / "concept.safetensors")
    by_hand = export(run, "--output", run / "again.safetensors")
    assert automatic.keys() == by_hand.keys()
    assert all(torch.equal(automatic[key], by_hand[key]) for key in automatic)
    assert {tensor.dtype for tensor in automatic.values()} == {torch.float16}


def test_average_and_last_weights(run, tmp_path):
    parts = {name: load_file(run / "checkpoints" / "step-00000003" / f"{name}.safetensors") for name in ("unet", "ema")}
    for which, part in (("raw", "unet"), ("ema", "ema")):
        out = export(run, "--weights", which, "--dtype", "fp32", "--output", tmp_path / f"{which}.safetensors")
        assert torch.equal(out["input_blocks.0.0.weight"], parts[part]["conv_in.weight"])
        assert torch.equal(out["out.2.weight"], parts[part]["conv_out.weight"])
    assert not torch.equal(parts["unet"]["conv_in.weight"], parts["ema"]["conv_in.weight"])


def test_both_forms_hold_the_same_constants(run, tmp_path):
    folded = export(run, "--dtype", "fp32", "--output", tmp_path / "folded.safetensors")
    compact = export(run, "--dtype", "fp32", "--form", "compact", "--output", tmp_path / "compact.safetensors")
    assert (describe(folded).form, describe(compact).form) == ("folded", "compact")
    assert all(torch.equal(features(folded)[block], value) for block, value in features(compact).items())


def test_a_compact_file_stands_beside_the_folded_one(run):
    folded = (run / "concept.safetensors").read_bytes()
    export(run, "--form", "compact")
    assert describe(load_file(run / "concept-compact.safetensors")).form == "compact"
    assert (run / "concept.safetensors").read_bytes() == folded


def test_an_earlier_checkpoint_can_be_exported(run, tmp_path):
    export(run / "checkpoints" / "step-00000002", "--output", tmp_path / "early.safetensors")
    with safe_open(tmp_path / "early.safetensors", "pt") as file:
        assert file.metadata()["gcfg.steps"] == "2"


def test_the_file_tells_how_it_was_made(run):
    with safe_open(run / "concept.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {
        "gcfg.mode": "null_text",
        "gcfg.null_text": "uniform_mean",
        "gcfg.weights": "ema",
        "gcfg.steps": "3",
        "gcfg.images": "48",
        "gcfg.batch_size": "4",
        "gcfg.learning_rate": "0.001",
        "gcfg.prior": "prior.safetensors",
        "gcfg.context_dim": "32",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "concept",
        "modelspec.resolution": "32x32",
        "modelspec.prediction_type": "epsilon",
    }
    assert expected.items() <= metadata.items()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    done = CliRunner().invoke(app, ["export", str(tmp_path)])
    assert done.exit_code == 1
    assert f"Error: {str(tmp_path)!r} holds no whole checkpoint, expected a run's output.folder" in done.stderr


def test_the_prompt_mode_trains_a_whole_unet_on_its_prompt(
    config_file, tmp_path, tiny_unet, tiny_clip, tiny_vae, cache, tokenizer
):
    """The DreamBooth baseline: its first loss is that of the prior under the prompt, and its text layers learn."""
    settings = {"model": {"mode": "prompt", "prompt": "a face", "tokenizer": str(tokenizer)}, "train": {"steps": 1}}
    train(load_config(config_file(**settings)))
    ids = [49406, 26, *(ord(letter) - ord("a") for letter in "fac"), 26 + ord("e") - ord("a"), *[49407] * 71]
    text = tiny_clip(torch.tensor([ids])).last_hidden_state
    recipe = Recipe(vae_fingerprint(tiny_vae), 32, "resize", True)
    batch = SampleStream(Latents.open(cache, recipe), 0, tiny_vae.config.scaling_factor).batch(range(4))
    t = (batch.u * 1000).long()
    schedule = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with torch.no_grad():
        out = tiny_unet(schedule.add_noise(batch.x0, batch.noise, t), t, text.expand(4, -1, -1)).sample
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx((out - batch.noise).square().mean().item(), rel=1e-5)
    file = load_file(tmp_path / "run" / "concept.safetensors")
    assert describe(file).form == "ordinary"
    before = {k: v.half() for k, v in diffusers_to_ldm(tiny_unet.state_dict()).items()}
    assert file.keys() == before.keys()
    assert all(not torch.equal(file[key], before[key]) for key in before if key.endswith("attn2.to_k.weight"))
    with pytest.raises(GuidanceError, match=r"run of mode 'prompt', .* leave --form out"):
        export_run(tmp_path / "run", form="compact")


def test_the_prompt_mode_needs_a_tokenizer(config_file, tmp_path):
    with pytest.raises(GuidanceError, match=r"model\.tokenizer"):
        train(load_config(config_file(model={"mode": "prompt", "prompt": "a photo of a digit"})))
    assert not (tmp_path / "run").exists()


def test_trained_constants_move_and_fixed_ones_do_not(config_file, tmp_path, run):
    train(load_config(config_file(train={"steps": 2}, model={"train_null_text": True})))
    fixed = load_file(run / "checkpoints" / "step-00000002" / "unet.safetensors")
    first = load_file(run / "checkpoints" / "step-00000003" / "unet.safetensors")
    trained = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "unet.safetensors")
    names = [key for key in fixed if key.endswith("null_text_feature")]
    assert names
    for key in names:
        assert torch.equal(fixed[key], first[key])
        assert not torch.equal(fixed[key], trained[key])


def test_a_full_disk_leaves_the_checkpoint_before(config_file, tmp_path, monkeypatch):
    config = load_config(config_file(train={"steps": 6}))
    written = checkpoints.save_file

    def full(tensors, path):
        if "step-00000004" in str(path) and path.name == "unet.safetensors":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(GuidanceError, match=r"step-00000004' cannot be written: the disk is full; free some space"):
        train(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    train(config)  # goes on where it was
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_too_many_bad_steps_stop_the_run(config_file, tmp_path, monkeypatch):
    result = learner.StepResult(float("nan"), float("inf"), True)
    monkeypatch.setattr(learner.Learner, "step", lambda self, step, batches: result)
    with pytest.raises(GuidanceError, match=r"NaN or infinite in 3 steps in a row .* train\.learning_rate"):
        train(load_config(config_file(train={"max_skipped_steps": 3})))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"], line["loss"]) for line in lines] == [
        (1, 1, None),
        (2, 2, None),
        (3, 3, None),
    ]
