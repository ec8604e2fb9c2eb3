"""Run as a program: what ComfyUI's own loaders make of the files that the methods of mode 'prompt' export.

    python oracle_methods.py FOLDER [COMFYUI]

Reads FOLDER/inputs.safetensors (x, t, context), the UNet files FOLDER/unet-NAME.safetensors, the LoRA lora.safetensors
of unet-prior.safetensors, the text encoder clip.safetensors, the embedding digit.safetensors and prompt.txt; writes
expected.safetensors: the output of each UNet, of the prior under the LoRA ('patched'), and the prompt's 'text'; and
names.json: how ComfyUI calls the modules of SD1.5's UNet in LoRA files.
"""

import json
import sys
from pathlib import Path

import torch
from comfyui_gcfg.testkit.inprocess import import_comfyui
from oracle_comfyui import clip, encoder
from safetensors.torch import load_file, save_file

SD15 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}


def output(comfy, model, inputs):
    """The UNet's own, with its patches."""
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model.float()
    return unet(inputs["x"], timesteps=inputs["t"], context=inputs["context"])


@torch.no_grad()
def main(folder, tree=None):
    comfy = import_comfyui(Path(tree) if tree else None, cpu=True)
    torch.set_num_threads(1)
    inputs, expected = load_file(folder / "inputs.safetensors"), {}
    for path in folder.glob("unet-*.safetensors"):
        model = comfy.sd.load_unet(str(path))
        expected[path.stem.removeprefix("unet-")] = output(comfy, model, inputs)
    prior = comfy.sd.load_unet(str(folder / "unet-prior.safetensors"))
    lora = comfy.utils.load_torch_file(str(folder / "lora.safetensors"), safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(prior, None, lora, 1.0, 0.0)
    expected["patched"] = output(comfy, patched, inputs)

    text_model = encoder(comfy, folder, clip(load_file(folder / "clip.safetensors"), "text_model."), 128, "quick_gelu")
    tokenizer = comfy.sd1_clip.SDTokenizer(embedding_directory=str(folder), embedding_size=128)
    tokens = tokenizer.tokenize_with_weights((folder / "prompt.txt").read_text())
    expected["text"] = text_model.encode_token_weights(tokens)[0]

    save_file({key: value.float().contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    names = sorted(name.removesuffix(".weight") for name in comfy.utils.unet_to_diffusers(SD15))
    (folder / "names.json").write_text(json.dumps(["lora_unet_" + name.replace(".", "_") for name in names]))
    (folder / "tokenizer.txt").write_text(tokenizer.tokenizer.name_or_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
