"""A small world of real parts: a checkpoint in Stable Diffusion's file layout, and folders of handwritten digits."""

import multiprocessing
import os
from multiprocessing.forkserver import ensure_running
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_gcfg.command.main import main
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.data.encode_images import encode_images
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from transformers import CLIPTextConfig, CLIPTextModel

RESOLUTION = 32
# For the processes that tests start.
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def tiny_unet():
    """An SD1.x UNet of two resolutions and 32 channels, with everything an SD1.5 has."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()


@pytest.fixture(scope="session")
def tiny_vae():
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
    )
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_clip():
    torch.manual_seed(2)
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1)
    return CLIPTextModel(config).eval()


def save_checkpoint(path, unet, vae, clip):
    """Write them as one file: LDM's UNet keys, diffusers' VAE keys, Hugging Face's CLIP keys."""
    parts = {
        "model.diffusion_model.": diffusers_to_ldm(unet.state_dict()),
        "first_stage_model.": vae.state_dict(),
        "cond_stage_model.transformer.": clip.state_dict(),
    }
    save_file({f"{prefix}{k}": v.contiguous() for prefix, part in parts.items() for k, v in part.items()}, path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_unet, tiny_vae, tiny_clip):
    return save_checkpoint(tmp_path_factory.mktemp("prior") / "prior.safetensors", tiny_unet, tiny_vae, tiny_clip)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """48 of scikit-learn's handwritten digit scans, as files."""
    folder = tmp_path_factory.mktemp("digits")
    for index, scan in enumerate(load_digits().images[:48]):
        pixels = (scan * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((RESOLUTION, RESOLUTION), Image.Resampling.NEAREST).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def write_config():
    """Write a config of a short run; keyword arguments are sections that add to it."""

    def write(folder, checkpoint, images, cache, **sections):
        base = {
            "model": {"checkpoint": str(checkpoint)},
            "data": {"images": str(images), "cache": str(cache), "resolution": RESOLUTION, "workers": 0},
            "train": {"steps": 6, "batch_size": 4, "learning_rate": 1e-3},
            "sample": {"every": 0},
            "output": {"folder": str(folder / "run"), "checkpoint_every": 2, "tensorboard": False},
        }
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        lines = [
            line
            for section, values in base.items()
            for line in (f"[{section}]", *(f"{k} = {toml(v)}" for k, v in values.items()))
        ]
        path = folder / "config.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def toml(value):
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture(scope="session")
def cache(tmp_path_factory, checkpoint, digits, write_config):
    """The digits, encoded once for all tests that only read them."""
    folder = tmp_path_factory.mktemp("cache")
    encode_images(load_config(write_config(folder, checkpoint, digits, folder / "cache")))
    return folder / "cache"


@pytest.fixture
def config_file(tmp_path, checkpoint, digits, cache, write_config):
    """Write a config on the small world into the test's own folder."""
    return lambda **sections: write_config(tmp_path, checkpoint, digits, cache, **sections)


@pytest.fixture(autouse=True)
def _new_processes():
    """Accelerate keeps one state per process; each test may want another precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def start():
    """Start the command in a process of its own, forked from one that has the libraries already."""
    context = multiprocessing.get_context("forkserver")
    commands = ("training.run", "training.data.encode_images", "evaluation.run")
    context.set_forkserver_preload([f"comfyui_gcfg.{command}" for command in commands])

    with mock.patch.dict(os.environ, QUIET):
        ensure_running()

    def begin(*arguments):
        process = context.Process(target=main, args=([str(each) for each in arguments],))
        process.start()
        return process

    return begin
