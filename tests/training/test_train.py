"""`gcfg train` as it is used: whole runs, broken off and gone on with, in real processes."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.run import train
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PARTS = ("unet", "ema", "optimizer")


def log_of(folder):
    """What the log says of each step, without its clock."""
    lines = (json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"], line["skipped"]) for line in lines]


def weights_of(folder, step):
    checkpoint = folder / "run" / "checkpoints" / f"step-{step:08d}"
    return {part: (checkpoint / f"{part}.safetensors").read_bytes() for part in PARTS}


def exported(folder, name="concept"):
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(folder / "run" / f"{name}.safetensors").items()}


LONG = {"train": {"steps": 40}, "output": {"checkpoint_every": 1, "keep_last": 2}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, checkpoint, digits, cache, write_config):
    """The run that all broken ones must equal."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(load_config(write_config(folder, checkpoint, digits, cache, **LONG)))
    return folder


def assert_equal_runs(folder, unbroken):
    assert log_of(folder) == log_of(unbroken)
    assert weights_of(folder, 40) == weights_of(unbroken, 40)
    assert exported(folder) == exported(unbroken)
    assert not list(folder.rglob(".unfinished-*"))


def test_a_run_killed_at_ten_random_points_equals_the_unbroken_one(config_file, tmp_path, unbroken, start):
    config = config_file(**LONG)
    rng = random.Random(20)
    log, checkpoints = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "checkpoints"
    for kill in range(10):
        process = start("train", config)
        steps = kill * 3 + rng.randint(
            0, 3
        )  # spread over the run, with steps left after the last; random moments of a step
        while process.is_alive() and not (log.exists() and log.read_text().count("\n") > steps):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        assert process.is_alive(), "the run ended before it was killed"
        process.kill()
        process.join()
        for folder in checkpoints.glob("step-*"):  # what bears a checkpoint's name is whole
            manifest = json.loads((folder / "manifest.json").read_text())
            for name, seal in manifest["files"].items():
                assert (folder / name).stat().st_size == seal["bytes"]
    process = start("train", config)
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(tmp_path, unbroken)


def test_a_run_killed_in_the_middle_of_its_checkpoints_equals_the_unbroken_one(config_file, tmp_path, unbroken, start):
    config = config_file(**LONG)
    checkpoints = tmp_path / "run" / "checkpoints"
    caught = 0
    for delay in (0, 0, 0.001, 0.003, 0.005):
        process = start("train", config)
        before = set(checkpoints.glob(".unfinished-*"))
        while process.is_alive() and not set(checkpoints.glob(".unfinished-*")) - before:
            pass
        time.sleep(delay)
        process.kill()
        process.join()
        caught += any(checkpoints.glob(".unfinished-*"))
    assert caught, "no kill met a checkpoint that was being written"
    start("train", config).join()
    assert_equal_runs(tmp_path, unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(config_file, tmp_path, unbroken, start, number):
    config = config_file(train={"steps": 40}, output={"checkpoint_every": 1000})
    process = start("train", config)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    done = len(log.read_text().splitlines())
    assert 5 < done < 40
    assert weights_of(tmp_path, done)  # saved at the very step, not at the last round one
    again = start("train", config)
    again.join()
    assert again.exitcode == 0
    assert_equal_runs(tmp_path, unbroken)


def test_two_commands_do_not_share_a_folder(config_file, tmp_path, start):
    config = config_file(train={"steps": 1000})
    first = start("train", config)
    while not (tmp_path / "run" / "log.jsonl").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(GuidanceError, match=r"output\.folder .*run' is in use by another gcfg command"):
            train(load_config(config))
    finally:
        first.kill()
        first.join()
    train(load_config(config_file(train={"steps": 1})))  # the dead one's lock is gone


def test_another_seed_is_another_run(config_file, tmp_path, unbroken):
    """The equalities above would hold as well if nothing of the state counted."""
    train(load_config(config_file(train={"steps": 2, "seed": 1})))
    assert log_of(tmp_path)[0] != log_of(unbroken)[0]


def test_the_loss_falls(unbroken):
    losses = [loss for _, loss, _, _ in log_of(unbroken)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])


def test_a_longer_run_passes_over_a_damaged_checkpoint_and_samples_change_nothing(
    config_file, tmp_path, unbroken, caplog
):
    sections = {"sample": {"every": 7, "steps": 2, "seeds": [0]}, "output": {"checkpoint_every": 10, "keep_last": 3}}
    config = load_config(config_file(train={"steps": 40}, **sections))
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 20})}))
    newest = tmp_path / "run" / "checkpoints" / "step-00000020" / "ema.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-7] ^= 1
    newest.write_bytes(damaged)
    train(config)
    assert "step-00000020 is damaged" in caplog.text
    assert_equal_runs(tmp_path, unbroken)


def test_only_the_last_checkpoints_are_kept(unbroken):
    assert sorted(path.name for path in (unbroken / "run" / "checkpoints").iterdir()) == [
        "step-00000039",
        "step-00000040",
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"seed": 3}}, "train.seed was 0, now 3"),
        ({"data": {"flips": False}}, "data.cache"),
        ({"model": {"train_null_text": True}}, "model.train_null_text was False, now True"),
    ],
)
def test_a_run_is_not_gone_on_with_as_another_one(config_file, tmp_path, sections, message):
    train(load_config(config_file(train={"steps": 2})))
    before = log_of(tmp_path)
    sections.setdefault("train", {}).setdefault("steps", 4)
    with pytest.raises(GuidanceError, match=message):
        train(load_config(config_file(**sections)))
    assert log_of(tmp_path) == before


def test_another_prior_is_named(config_file, tmp_path, checkpoint):
    from safetensors.torch import save_file

    train(load_config(config_file(train={"steps": 2})))
    other = {key: tensor.clone() for key, tensor in load_file(checkpoint).items()}
    other["model.diffusion_model.out.2.weight"] += 1
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(GuidanceError, match=r"model\.checkpoint holds another UNet than at the start of the run"):
        train(load_config(config_file(train={"steps": 4}, model={"checkpoint": str(tmp_path / "other.safetensors")})))


def test_samples_and_tensorboard_tell_what_the_log_tells(config_file, tmp_path):
    train(
        load_config(
            config_file(
                train={"steps": 4},
                sample={"every": 2, "weights": [0.0, 1.5], "seeds": [0, 1, 2], "steps": 3},
                output={"tensorboard": True},
            )
        )
    )
    samples = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in samples] == ["step-00000002.png", "step-00000004.png"]
    first, second = (np.asarray(Image.open(path)).reshape(2, -1, 96, 3) for path in samples)
    caption = first.shape[1] - 32
    assert (first[0] == second[0]).all()  # weight 0: the frozen prior
    assert (first[1, caption:] != second[1, caption:]).any()  # the concept has moved
    assert (first[1, caption:, :32] != first[1, caption:, 32:64]).any()  # another seed, another picture
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0}).Reload()
    told = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("loss")]
    assert [(step, loss) for step, loss, *_ in log_of(tmp_path)] == told
    assert [event.step for event in events.Images("samples")] == [2, 4]


def test_bf16_keeps_fp32_weights_and_stays_near(config_file, tmp_path, unbroken):
    train(load_config(config_file(train={"steps": 5, "precision": "bf16"})))
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000005" / "unet.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    full = [loss for _, loss, _, _ in log_of(unbroken)][:5]
    half = [loss for _, loss, _, _ in log_of(tmp_path)]
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}])
def test_what_only_saves_memory_changes_only_rounding(config_file, tmp_path, unbroken, change):
    train(load_config(config_file(train={"steps": 5, **change})))
    full = [loss for _, loss, _, _ in log_of(unbroken)][:5]
    assert [loss for _, loss, _, _ in log_of(tmp_path)] == pytest.approx(full, rel=1e-4)
