"""Run as a program: what ComfyUI's own text encoders and autoencoder make of small checkpoints.

    python oracle_comfyui.py FOLDER [COMFYUI]

Reads FOLDER/sd1.safetensors, sd2.safetensors and sdxl.safetensors and the prompts in FOLDER/prompts.json; writes
expected.safetensors (text by family and prompt, the autoencoders' latents and pictures), vae.safetensors and
taesd.safetensors (their weights in ComfyUI's keys) and tokenizer.txt (where its tokenizer is).
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from comfyui_gcfg.testkit.inprocess import import_comfyui
from safetensors.torch import load_file, save_file

PENULTIMATE = {"layer": "hidden", "layer_idx": -2}  # as in ComfyUI's SD2ClipHModel, SDXLClipG and SDXLClipModel
OPEN_CLIP = {"special_tokens": {"start": 49406, "end": 49407, "pad": 0}}


def config(width, layers, act):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 2 * width,
        "hidden_act": act,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "projection_dim": width,
        "eos_token_id": 49407,
    }


def encoder(comfy, folder, weights, width, act, **options):
    """ComfyUI's text model with weights in Hugging Face's keys."""
    layers = len({key.split(".")[3] for key in weights if ".encoder.layers." in key})
    path = folder / "clip.json"
    path.write_text(json.dumps(config(width, layers, act)))
    model = comfy.sd1_clip.SDClipModel(textmodel_json_config=str(path), dtype=torch.float32, **options)
    if "text_projection.weight" not in weights:
        weights["text_projection.weight"] = torch.eye(width)
    missing, unexpected = model.transformer.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model


def below(checkpoint, prefix):
    return {key.removeprefix(prefix): value for key, value in checkpoint.items() if key.startswith(prefix)}


def clip(checkpoint, prefix):
    return {f"text_model.{key}": value for key, value in below(checkpoint, prefix).items()}


def open_clip(comfy, checkpoint, prefix):
    found = {f"g.{key}": value for key, value in below(checkpoint, prefix).items()}
    return below(comfy.utils.clip_text_transformers_convert(found, "g.", "h."), "h.")


def tokens(comfy, prompt, pad_with_end):
    return comfy.sd1_clip.SDTokenizer(pad_with_end=pad_with_end).tokenize_with_weights(prompt)


def texts(comfy, folder, prompts):
    sd1, sd2, sdxl = (load_file(folder / f"{family}.safetensors") for family in ("sd1", "sd2", "sdxl"))
    l = encoder(comfy, folder, clip(sd1, "cond_stage_model.transformer.text_model."), 128, "quick_gelu")  # noqa: E741
    h = encoder(
        comfy, folder, open_clip(comfy, sd2, "cond_stage_model.model."), 128, "gelu", **PENULTIMATE, **OPEN_CLIP
    )
    plain = {**PENULTIMATE, "layer_norm_hidden_state": False}
    xl_l = encoder(
        comfy, folder, clip(sdxl, "conditioner.embedders.0.transformer.text_model."), 64, "quick_gelu", **plain
    )
    xl_g = encoder(
        comfy, folder, open_clip(comfy, sdxl, "conditioner.embedders.1.model."), 128, "gelu", **plain, **OPEN_CLIP
    )
    found = {}
    for i, prompt in enumerate(prompts):
        found[f"sd1.{i}"] = l.encode_token_weights(tokens(comfy, prompt, True))[0]
        found[f"sd2.{i}"] = h.encode_token_weights(tokens(comfy, prompt, False))[0]
        first = xl_l.encode_token_weights(tokens(comfy, prompt, True))[0]
        second, pooled = xl_g.encode_token_weights(tokens(comfy, prompt, False))[:2]
        found[f"sdxl.{i}"], found[f"sdxl.{i}.pooled"] = torch.cat((first, second), dim=-1), pooled
    return found


def autoencoder(folder):
    from comfy.ldm.models.autoencoder import AutoencoderKL

    shape = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = AutoencoderKL(ddconfig=shape, embed_dim=4).eval().float()
    torch.manual_seed(0)
    for parameter in vae.parameters():  # ComfyUI leaves the memory as it finds it
        parameter.data = torch.randn(parameter.shape) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    save_file(vae.state_dict(), folder / "vae.safetensors")
    picture = torch.rand(1, 3, 32, 48) * 2 - 1
    moments = vae.quant_conv(vae.encoder(picture))
    return {"picture": picture, "mean": moments[:, :4].contiguous(), "decoded": vae.decode(moments[:, :4])}


def tiny_autoencoder(comfy, folder):
    """What ComfyUI's VAE class makes of a TAESD: a latent, what the UNet sees of it, and the picture of it."""
    taesd = importlib.import_module("comfy.taesd.taesd").TAESD()
    torch.manual_seed(1)
    for parameter in taesd.parameters():
        parameter.data = torch.randn(parameter.shape) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    taesd.vae_scale.data = torch.tensor(0.18215)
    if hasattr(taesd, "vae_shift"):  # not in the oldest
        taesd.vae_shift.data = torch.tensor(0.3)
    weights = taesd.state_dict()
    save_file(weights, folder / "taesd.safetensors")
    vae = comfy.sd.VAE(sd=dict(weights))
    picture = torch.rand(2, 3, 64, 64) * 2 - 1
    latent = vae.encode(picture.movedim(1, -1) * 0.5 + 0.5)
    return {
        "taesd.picture": picture,
        "taesd.latent": latent,
        "taesd.seen": comfy.latent_formats.SD15().process_in(latent),
        "taesd.decoded": vae.decode(latent).movedim(-1, 1) * 2 - 1,
    }


@torch.no_grad()
def main(folder, tree=None):
    comfy = import_comfyui(Path(tree) if tree else None, cpu=True)
    torch.set_num_threads(1)
    prompts = json.loads((folder / "prompts.json").read_text())
    found = texts(comfy, folder, prompts) | autoencoder(folder) | tiny_autoencoder(comfy, folder)
    save_file({key: value.float().contiguous() for key, value in found.items()}, folder / "expected.safetensors")
    (folder / "tokenizer.txt").write_text(comfy.sd1_clip.SDTokenizer().tokenizer.name_or_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
