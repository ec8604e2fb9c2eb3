"""A small world to evaluate: a prior, models made from it in every form, a ControlNet, scans, and plain metrics."""

import json
import os

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_gcfg.command.main import main
from comfyui_gcfg.evaluation.config_file import load_config
from comfyui_gcfg.gcfg.concept_file import compact
from comfyui_gcfg.gcfg.null_text import cross_attention_blocks
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm
from comfyui_gcfg.testkit import processes, tiny
from comfyui_gcfg.training.concept import to_null_text
from comfyui_gcfg.training.export import export_unet
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

SIZE = tiny.RESOLUTION
STANDINS = """
import torch

class Moments(torch.nn.Module):
    '''Twelve numbers of an image: its quarters' mean colours.'''
    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)

def extractor(weights):
    return Moments()

def classifier(weights):
    '''Is the channel that the label names the brightest?'''
    return lambda images, label: images.float().mean((2, 3)).argmax(1) == ("red", "green", "blue").index(label)
"""


@pytest.fixture(scope="session")
def tiny_unet():
    return tiny.tiny_unet()


@pytest.fixture(scope="session")
def tiny_vae():
    return tiny.tiny_vae()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_unet, tiny_vae):
    path = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    return tiny.save_checkpoint(path, tiny_unet, tiny_vae, tiny.tiny_clip())


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """48 of scikit-learn's handwritten digit scans, as files."""
    return tiny.write_digits(tmp_path_factory.mktemp("digits"))


def changed(unet, seed, scale=0.02):
    """A copy of a UNet with noise on every weight."""
    copy = UNet2DConditionModel.from_config(unet.config)
    generator = torch.Generator().manual_seed(seed)
    weights = {k: v + scale * torch.randn(v.shape, generator=generator) for k, v in unet.state_dict().items()}
    copy.load_state_dict(weights)
    return copy.eval()


@pytest.fixture(scope="session")
def tuned_unet(tiny_unet):
    """A fine-tuned UNet that reads text."""
    return changed(tiny_unet, 1)


@pytest.fixture(scope="session")
def concept_unet(tiny_unet):
    """A null-text UNet."""
    unet = changed(tiny_unet, 2)
    generator = torch.Generator().manual_seed(3)
    blocks = cross_attention_blocks(unet)
    to_null_text(unet, {name: torch.randn(b.norm2.weight.numel(), generator=generator) for name, b in blocks.items()})
    return unet


@pytest.fixture(scope="session")
def controlnet(tiny_unet):
    """A ControlNet whose zero convolutions are not zero any more."""
    torch.manual_seed(4)
    controlnet = ControlNetModel.from_unet(tiny_unet, conditioning_channels=3, load_weights_from_unet=True)
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(parameter, std=0.2)
    return controlnet.eval().requires_grad_(False)


def control_keys(controlnet):
    """A ControlNet's weights in the keys of the authors' files, written out from their cldm.py."""
    renamed = {}
    last = 2 * (len(controlnet.controlnet_cond_embedding.blocks) + 1)
    for key, tensor in diffusers_to_ldm(controlnet.state_dict()).items():
        head, _, rest = key.partition(".")
        number, _, end = rest.partition(".")
        if head == "controlnet_down_blocks":
            key = f"zero_convs.{number}.0.{end}"
        elif head == "controlnet_mid_block":
            key = f"middle_block_out.0.{rest}"
        elif rest.startswith("conv_in."):
            key = f"input_hint_block.0.{end}"
        elif rest.startswith("conv_out."):
            key = f"input_hint_block.{last}.{end}"
        elif rest.startswith("blocks."):
            number, end = end.split(".")
            key = f"input_hint_block.{2 * int(number) + 2}.{end}"
        renamed[f"control_model.{key}"] = tensor.contiguous()
    return renamed


@pytest.fixture(scope="session")
def world(tmp_path_factory, checkpoint, tuned_unet, concept_unet, controlnet):
    """A folder with everything that a config names."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "prior.safetensors").symlink_to(checkpoint)
    stated = {"gcfg.trained_parameters": "123456"}
    export_unet(tuned_unet.state_dict(), folder / "tuned.safetensors", "ordinary", "fp32", 32, stated)
    export_unet(concept_unet.state_dict(), folder / "concept.safetensors", "folded", "fp32", 32, {})
    save_file(compact(load_file(folder / "concept.safetensors")), folder / "compact.safetensors")
    save_file(
        {"emb_params": torch.randn(1, 32, generator=torch.Generator().manual_seed(5))}, folder / "word.safetensors"
    )
    save_file(control_keys(controlnet), folder / "control.safetensors")
    (folder / "evaluation_standins.py").write_text(STANDINS)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>"]
    ids = {token: number for number, token in enumerate(tokens)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(ids))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return folder


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else str(value).lower()


@pytest.fixture(scope="session")
def write_evaluation(world, digits):
    """Write a config of the small world into a folder; keyword arguments add to its sections."""
    known, moments = "evaluation_standins:classifier", "evaluation_standins:extractor"
    prompts = [{"prompt": "a b", "label": "red"}, {"prompt": "c", "label": "green"}]

    def write(folder, **sections):
        base = {
            "prior": {"checkpoint": "prior.safetensors", "tokenizer": "tokenizer", "controlnet": "control.safetensors"},
            "sampling": {"size": SIZE, "steps": 2, "batch_size": 4},
            "models": {
                "tuned": {"unet": "tuned.safetensors"},
                "concept": {"unet": "concept.safetensors", "parameters": 1000},
                "word": {"embedding": "word.safetensors", "token": "<d>", "parameters": 32},
            },
            "fid": {"images": str(digits), "count": 10, "search_count": 6, "resize": "none", "extractor": moments},
            "alignment": {"per_prompt": 5, "search_per_prompt": 3, "classifier": known, "prompts": prompts},
            "canny": {"images": str(digits), "count": 3, "per_condition": 2, "search_count": 1},
            "diversity": {"prompts": ["a b", "c"], "per_prompt": 5},
        }
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        for link in world.iterdir():
            if not (folder / link.name).exists():
                (folder / link.name).symlink_to(link)
        lines = [f"[{section}]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in base[section].items()) for section in base]
        path = folder / "evaluation.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(world))
        patch.setenv("PYTHONPATH", str(world), prepend=os.pathsep)
        yield write


@pytest.fixture
def evaluation_file(tmp_path, write_evaluation):
    """Write a config into the test's own folder."""
    return lambda **sections: write_evaluation(tmp_path, **sections)


@pytest.fixture
def evaluation_config(evaluation_file):
    return lambda **sections: load_config(evaluation_file(**sections))


@pytest.fixture(autouse=True)
def _new_processes():
    """Accelerate keeps one state per process; each test may want another precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def start():
    """Start the command in a process of its own."""
    return processes.starter(main, ["comfyui_gcfg.evaluation.run"])
