"""The files of the methods in ComfyUI's stock loaders: UNETLoader's, LoraLoader's and the prompt's `embedding:name`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.testkit import models
from comfyui_gcfg.training.config import ModelConfig
from comfyui_gcfg.training.export import export_part, export_unet
from comfyui_gcfg.training.methods.adapters import PROJECTIONS, lora_file
from comfyui_gcfg.training.methods.network import ordinary_unet, prompted
from comfyui_gcfg.training.methods.textual_inversion import EMBEDDING_KEY, add_word, read_embedding
from comfyui_gcfg.training.prior.model import open_prior
from comfyui_gcfg.training.prior.text_encoder import encode_ids, load_text_models, token_ids
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

METHODS = ("full", "cross_attention", "lora", "oft")
ABOUT = {"modelspec.architecture": "stable-diffusion-v1"}
PROMPT = "a photo of {}, on red Paper"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Files of each method on the small UNet that the stock loader takes, and what their networks gave before."""
    folder = tmp_path_factory.mktemp("methods")
    save_file(models.unet_state_dict("sd15"), folder / "unet-prior.safetensors")
    prior = open_prior(folder / "unet-prior.safetensors")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(1, 4, 8, 8, generator=generator),
        "t": torch.tensor([500]),
        "context": torch.randn(1, 77, 768, generator=generator),
    }
    save_file(inputs, folder / "inputs.safetensors")
    outputs = {}
    for method in METHODS:
        model = ModelConfig(mode="prompt", prompt="a", method=method, rank=4, oft_block_size=32)
        network = prompted(prior, model, seed=0).eval()
        trained = {name: each for name, each in network.named_parameters() if each.requires_grad}
        with torch.no_grad():
            for tensor in trained.values():  # as if it had learned
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
            outputs[method] = network(inputs["x"], inputs["t"], inputs["context"]).sample
        unet = trained if method == "full" else ordinary_unet(prior, model, trained)
        export_unet(unet, folder / f"unet-{method}.safetensors", "ordinary", "fp32", 768, ABOUT)
        if method == "lora":
            export_part(lora_file(trained), folder / "lora.safetensors", "fp32", ABOUT, "lora")
    return folder, outputs


@pytest.fixture(scope="module")
def comfyui(networks, comfyui_path):
    folder, _ = networks
    torch.manual_seed(2)
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2))
    weights = {name: tensor for name, tensor in clip.state_dict().items() if "position_ids" not in name}
    level = "" if any(name.startswith("text_model.") for name in weights) else "text_model."
    save_file({level + name: tensor for name, tensor in weights.items()}, folder / "clip.safetensors")
    vector = {EMBEDDING_KEY: 0.1 * torch.randn(1, 128)}
    export_part(vector, folder / "digit.safetensors", "fp32", ABOUT, "textual-inversion")
    (folder / "prompt.txt").write_text(PROMPT.format("embedding:digit"))
    command = [sys.executable, str(Path(__file__).with_name("oracle_methods.py")), str(folder)]
    done = subprocess.run(
        [*command, *([str(comfyui_path)] if comfyui_path else [])],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "NOT LOADED" not in done.stderr  # what ComfyUI says of a LoRA's key that it does not know
    return load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_the_stock_loader_computes_what_was_trained(networks, comfyui, method):
    _, outputs = networks
    torch.testing.assert_close(comfyui[method], outputs[method], rtol=1e-3, atol=1e-3)
    assert (comfyui[method] - comfyui["prior"]).abs().max() > 0.02


def test_the_stock_lora_loader_computes_what_was_trained(networks, comfyui):
    _, outputs = networks
    torch.testing.assert_close(comfyui["patched"], outputs["lora"], rtol=1e-3, atol=1e-3)


def test_a_lora_of_sd15_has_the_names_that_comfyui_knows(networks, comfyui):
    """All of them in the attentions; the small UNet above has but one resolution."""
    folder, _ = networks
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    weights = {name.removesuffix(".weight"): torch.zeros(1, 1) for name in unet.state_dict()}
    pairs = {
        f"{name}.lora_{half}.default.weight": zero
        for name, zero in weights.items()
        if name.endswith(PROJECTIONS)
        for half in "AB"
    }
    ours = {key.split(".")[0] for key in lora_file(pairs)}
    theirs = json.loads((folder / "names.json").read_text())
    projections = tuple(name.replace(".", "_") for name in PROJECTIONS)
    assert ours == {name for name in theirs if name.endswith(projections)}
    assert len(ours) == 16 * 8


def test_an_embedding_in_a_prompt(networks, comfyui):
    folder, _ = networks
    tokenizer = Path((folder / "tokenizer.txt").read_text())
    word = read_embedding(folder / "digit.safetensors", "<digit>", "x")
    models = load_text_models(folder / "clip.safetensors", "sd1", "x")
    plain = encode_ids(models, "sd1", token_ids(PROMPT.format("it"), tokenizer))
    add_word(models[0], word, "x")
    text = encode_ids(models, "sd1", token_ids(PROMPT.format("<digit>"), tokenizer, word.text))
    torch.testing.assert_close(text.context, comfyui["text"], rtol=1e-3, atol=1e-4)
    assert (text.context - plain.context).abs().max() > 0.1
