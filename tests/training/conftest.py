"""A small world of real parts: a checkpoint in Stable Diffusion's file layout, and folders of handwritten digits."""

import json

import pytest
from accelerate.state import AcceleratorState
from comfyui_gcfg.command.main import main
from comfyui_gcfg.testkit import processes, tiny
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.material import encode_images


@pytest.fixture(scope="session")
def tiny_unet():
    return tiny.tiny_unet()


@pytest.fixture(scope="session")
def tiny_vae():
    return tiny.tiny_vae()


@pytest.fixture(scope="session")
def tiny_clip():
    return tiny.tiny_clip()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_unet, tiny_vae, tiny_clip):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("prior") / "prior.safetensors", tiny_unet, tiny_vae, tiny_clip)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """CLIP's tokenizer without its merges: each letter is a word's part."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    ids = {token: number for number, token in enumerate(vocabulary)}
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({**ids, "<|startoftext|>": 49406, "<|endoftext|>": 49407}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """48 of scikit-learn's handwritten digit scans, as files."""
    return tiny.write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def write_config():
    """Write a config of a short run; keyword arguments are sections that add to it."""

    def write(folder, checkpoint, images, cache, **sections):
        base = {
            "model": {"checkpoint": str(checkpoint)},
            "data": {"images": str(images), "cache": str(cache), "resolution": tiny.RESOLUTION, "workers": 0},
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
    """Start the command in a process of its own."""
    return processes.starter(main, ["comfyui_gcfg.training.run", "comfyui_gcfg.training.material"])
