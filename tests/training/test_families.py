"""Whole short runs on the other families, from diffusers folders: what the UNet is told and asked is the family's."""

import json

import pytest
import torch
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.data.shards import Latents, Recipe, vae_fingerprint
from comfyui_gcfg.training.material import encode_images
from comfyui_gcfg.training.run import train
from comfyui_gcfg.training.stream import SampleStream
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

KINDS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "use_linear_projection": True,
}
SDXL = {
    "cross_attention_dim": 96,
    "attention_head_dim": (1, 1),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
}
SD2 = {"cross_attention_dim": 64, "attention_head_dim": (1, 1)}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, **_):
        return self.value.expand_as(x)


def clip(kind, width, pad):
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3, "num_attention_heads": 1}
    return kind(CLIPTextConfig(**sizes, projection_dim=width, pad_token_id=pad, eos_token_id=49407)).eval()


@pytest.fixture
def folder(tmp_path, tiny_vae):
    """Write a diffusers folder; return it with the UNet and the text encoders."""

    def write(family, scheduler):
        torch.manual_seed(3)
        unet = UNet2DConditionModel(**KINDS, **(SDXL if family == "sdxl" else SD2)).eval()
        if family == "sdxl":
            texts = [clip(CLIPTextModel, 32, 49407), clip(CLIPTextModelWithProjection, 64, 0)]
        else:
            texts = [clip(CLIPTextModel, 64, 0)]
        place = tmp_path / family
        unet.save_pretrained(place / "unet")
        tiny_vae.save_pretrained(place / "vae")
        scheduler.save_pretrained(place / "scheduler")
        for name, text in zip(("text_encoder", "text_encoder_2"), texts, strict=False):
            text.save_pretrained(place / name)
        return place, unet, texts

    return write


@pytest.fixture
def oblongs(tmp_path):
    """Images of several shapes, for SDXL's size conditioning."""
    place = tmp_path / "oblongs"
    place.mkdir()
    for index, size in enumerate([(40, 60), (60, 40), (64, 64), (50, 200)]):
        Image.effect_noise(size, 60).convert("RGB").save(place / f"{index}.png")
    return place


def empty(family, texts):
    """The empty prompt's embedding and pooled vector, by transformers."""
    end, pads = 49407, (49407, 0) if family == "sdxl" else (0,)
    outputs = [
        text(torch.tensor([[49406, end] + [pad] * 75]), output_hidden_states=True)
        for text, pad in zip(texts, pads, strict=True)
    ]
    if family == "sdxl":
        return torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[1].text_embeds
    return outputs[0].last_hidden_state, None


CASES = {
    "sdxl-eps": ("sdxl", DDIMScheduler(**SCHEDULE)),
    "sdxl-v-zero": ("sdxl", DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    "sd2-v": ("sd2", DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")),
    "sd2-flow": ("sd2", FlowMatchEulerDiscreteScheduler()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_is_that_of_a_loop_by_hand(case, folder, oblongs, tmp_path, write_config, tiny_vae):
    family, scheduler = CASES[case]
    place, unet, texts = folder(family, scheduler)
    config = load_config(
        write_config(
            tmp_path,
            place,
            oblongs,
            tmp_path / "cache",
            data={"fit": "centre_crop"},
            train={"steps": 2, "noise_offset": 0.1},
            sample={"every": 2, "steps": 2, "seeds": [0], "weights": [1.5]},
        )
    )
    encode_images(config)
    train(config)

    latents = Latents.open(tmp_path / "cache", Recipe(vae_fingerprint(tiny_vae), 32, "centre_crop", True))
    batch = SampleStream(latents, 0, tiny_vae.config.scaling_factor, 0.1).batch(range(4))
    with torch.no_grad():
        tokens, pooled = empty(family, texts)
        for name, module in [*unet.named_modules()]:
            if name.endswith("transformer_blocks.0"):
                values = module.attn2.to_v(tokens[0]).mean(dim=0)
                module.norm2 = torch.nn.Identity()
                module.attn2 = Constant(module.attn2.to_out[0](values))
        if case == "sd2-flow":
            t = batch.u * 1000
            share = batch.u.reshape(-1, 1, 1, 1)
            x, target = (1 - share) * batch.x0 + share * batch.noise, batch.noise - batch.x0
        else:
            t = (batch.u * 1000).long()
            x = scheduler.add_noise(batch.x0, batch.noise, t)
            target = batch.noise if case == "sdxl-eps" else scheduler.get_velocity(batch.x0, batch.noise, t)
        more = {}
        if family == "sdxl":
            sizes = torch.cat((batch.geometry, torch.full((4, 2), 32)), dim=1)
            more = {"added_cond_kwargs": {"text_embeds": pooled.expand(4, -1), "time_ids": sizes}}
        out = unet(x, t, tokens.expand(4, -1, -1), **more).sample
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx((out - target).square().mean().item(), rel=1e-5)
    assert len(set(map(tuple, batch.geometry.tolist()))) == 4  # the sizes did count
    with safe_open(tmp_path / "run" / "concept.safetensors", "pt") as file:
        stated = file.metadata()["modelspec.prediction_type"]
        marked = {"v_pred", "ztsnr"} & set(file.keys())
    assert stated == {"eps": "epsilon", "v": "v", "flow": "flow"}[case.split("-")[1]]
    assert marked == {"sdxl-v-zero": {"v_pred", "ztsnr"}, "sd2-v": {"v_pred"}}.get(case, set())
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
