"""`gcfg train --dry-run`: numbers that are true, and no trace of it."""

import re

import pytest
from comfyui_gcfg.command.main import app
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.dry_run import dry_run
from safetensors import safe_open
from typer.testing import CliRunner


def test_the_counted_numbers_are_true(config_file, tiny_unet, cache, tmp_path):
    cost = dry_run(load_config(config_file(train={"steps": 1000})))
    removed = sum(
        p.numel()
        for name, p in tiny_unet.named_parameters()
        if ".attn2." in name or (".norm2." in name and "transformer" in name)
    )
    constants = sum(p.numel() for name, p in tiny_unet.named_parameters() if name.endswith("attn2.to_out.0.bias"))
    trained = sum(p.numel() for p in tiny_unet.parameters()) - removed
    assert (cost.parameters, cost.trained) == (trained + constants, trained)
    # weights and their constants, gradients, two moments and a step count each, average
    tensors = sum(1 for name, _ in tiny_unet.named_parameters() if ".attn2." not in name and ".norm2." not in name)
    tensors += sum(1 for name, _ in tiny_unet.named_parameters() if ".norm2." in name and "resnets" in name)
    assert cost.state_bytes == 4 * (5 * trained + constants + tensors)
    assert cost.images == 48
    (shard,) = cache.glob("shard-*.safetensors")
    with safe_open(shard, "pt") as file:
        latents = sum(file.get_tensor(key).nbytes for key in file.keys() if key != "geometry")  # noqa: SIM118
    assert cost.cache_bytes == latents
    assert cost.seconds_left == pytest.approx(1000 * 4 / cost.images_per_second)
    assert cost.peak_bytes > cost.state_bytes
    assert not (tmp_path / "run").exists()


def test_before_there_is_a_cache_it_counts_the_images(config_file, tmp_path):
    done = CliRunner().invoke(app, ["train", str(config_file(data={"cache": "nowhere"})), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert re.search(r"cache +0\.0 MB for 48 images", done.stdout)
    assert re.search(r"speed +[\d.e+]+ images per second over 5 steps", done.stdout)
    assert re.search(r"time left +0:00:0\d", done.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml"]


def test_what_the_run_would_refuse_is_refused(config_file):
    with pytest.raises(GuidanceError, match=r"model\.checkpoint is not set"):
        dry_run(load_config(config_file(), ["model.checkpoint=''"]))
