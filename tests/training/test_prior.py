"""Reading a prior: its UNet against diffusers' own loader, text and autoencoder against ComfyUI's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.gcfg.concept_file import fold
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm
from comfyui_gcfg.testkit import layouts
from comfyui_gcfg.testkit.models import full_taesd
from comfyui_gcfg.training.data.shards import vae_fingerprint
from comfyui_gcfg.training.prior.model import open_prior
from comfyui_gcfg.training.prior.text_encoder import clip_config, encode_prompt, open_clip_config
from comfyui_gcfg.training.prior.unet import fingerprint
from comfyui_gcfg.training.prior.vae import load_vae
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

PROMPTS = ["", "a photo of a Tabby cat, café!"]
FAMILIES = ["sd1", "sd2", "sdxl"]
LAYOUTS = {
    "sd1": {"cross_attention_dim": 128, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 128, "attention_head_dim": [1, 2], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 192,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
        "transformer_layers_per_block": [2, 1],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 128,
    },
}
UNET_PREFIX = "model.diffusion_model."


def build(family="sd1", **more):
    """A small UNet of a family, with random weights."""
    torch.manual_seed(0)
    kinds = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    config = {"block_out_channels": [64, 128], "layers_per_block": 1, **kinds, **LAYOUTS[family], **more}
    return UNet2DConditionModel(**config).eval()


def in_ldm_keys(unet):
    return {f"{UNET_PREFIX}{key}": value for key, value in diffusers_to_ldm(unet.state_dict()).items()}


def random(shapes, prefix):
    """Weights by name and shape, of a spread at which the text matters."""
    torch.manual_seed(len(prefix))
    return {
        prefix + key: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) + (shape[1:] == ()) * 1.0
        for key, shape in shapes.items()
    }


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def clip_shapes(width, layers=3):
    """CLIP in Hugging Face's names, below text_model."""
    shapes = {
        "embeddings.token_embedding.weight": (49408, width),
        "embeddings.position_embedding.weight": (77, width),
        **affine("final_layer_norm", width),
    }
    for i in range(layers):
        here = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= affine(f"{here}.self_attn.{name}", width, width)
        shapes |= affine(f"{here}.mlp.fc1", 2 * width, width) | affine(f"{here}.mlp.fc2", width, 2 * width)
        shapes |= affine(f"{here}.layer_norm1", width) | affine(f"{here}.layer_norm2", width)
    return shapes


def open_clip_shapes(width, layers=3):
    """OpenCLIP's names."""
    shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        **affine("ln_final", width),
    }
    for i in range(layers):
        here = f"transformer.resblocks.{i}"
        shapes |= {f"{here}.attn.in_proj_weight": (3 * width, width), f"{here}.attn.in_proj_bias": (3 * width,)}
        shapes |= affine(f"{here}.attn.out_proj", width, width)
        shapes |= affine(f"{here}.mlp.c_fc", 2 * width, width) | affine(f"{here}.mlp.c_proj", width, 2 * width)
        shapes |= affine(f"{here}.ln_1", width) | affine(f"{here}.ln_2", width)
    return shapes


@pytest.fixture(scope="module")
def unets():
    return {family: build(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, unets):
    """Checkpoints of the three families, with text encoders."""
    folder = tmp_path_factory.mktemp("priors")
    position_ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77.0)[None]}
    texts = {
        "sd1": random(clip_shapes(128), "cond_stage_model.transformer.text_model."),
        "sd2": random(open_clip_shapes(128), "cond_stage_model.model."),
        "sdxl": random(clip_shapes(64), "conditioner.embedders.0.transformer.text_model.")
        | random(open_clip_shapes(128), "conditioner.embedders.1.model."),
    }
    save_file(in_ldm_keys(unets["sd1"]) | texts["sd1"] | position_ids, folder / "sd1.safetensors")
    for family in ("sd2", "sdxl"):
        save_file(in_ldm_keys(unets[family]) | texts[family], folder / f"{family}.safetensors")
    return folder


@pytest.fixture(scope="module")
def comfyui(folder, comfyui_path):
    """What ComfyUI makes of the checkpoints, from a process of its own; and the folder of its tokenizer."""
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    # It reads the names of the text encoder's tensors strictly, and position_ids is none of its own.
    checkpoint = load_file(folder / "sd1.safetensors")
    work = folder / "comfyui"
    work.mkdir()
    save_file({key: value for key, value in checkpoint.items() if "position_ids" not in key}, work / "sd1.safetensors")
    for name in ("sd2.safetensors", "sdxl.safetensors", "prompts.json"):
        (work / name).symlink_to(folder / name)
    command = [sys.executable, str(Path(__file__).with_name("oracle_comfyui.py")), str(work)]
    done = subprocess.run(
        [*command, *([str(comfyui_path)] if comfyui_path else [])],
        cwd=work,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return work, load_file(work / "expected.safetensors")


# --- UNet


@pytest.fixture(params=["checkpoint", "bare LDM", "bare diffusers", "folder", "fp16 folder"])
def written(request, tmp_path):
    """Write a UNet in one of the ways in which one comes."""

    def write(unet):
        if "folder" in request.param:
            variant = "fp16" if "fp16" in request.param else None
            unet.save_pretrained(tmp_path / "model" / "unet", variant=variant)
            return tmp_path / "model"
        weights = unet.state_dict() if request.param == "bare diffusers" else in_ldm_keys(unet)
        if request.param == "bare LDM":
            weights = {key.removeprefix(UNET_PREFIX): value for key, value in weights.items()}
        if request.param == "checkpoint":
            weights["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
            weights["model_ema.decay"] = torch.zeros(())
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


@torch.no_grad()
def output(unet):
    torch.manual_seed(3)
    width = unet.config.cross_attention_dim
    pooled = {"text_embeds": torch.randn(2, 128), "time_ids": torch.tensor([[512, 512, 0, 0, 512, 512]] * 2)}
    added = pooled if unet.config.addition_embed_type else None
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, width)
    return unet(x, torch.tensor([5, 900]), encoder_hidden_states=text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unet_is_the_one_in_the_file(unets, written, family):
    prior = open_prior(written(unets[family]))
    unet = prior.load_unet()
    assert not unet.training
    assert torch.equal(output(unet), output(unets[family]))
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in unet.parameters())
    assert (prior.family, prior.context_dim) == (family, LAYOUTS[family]["cross_attention_dim"])
    assert prior.pooled_dim == (128 if family == "sdxl" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unet_is_the_one_diffusers_own_loader_makes(folder, unets, tmp_path, family):
    unets[family].save_config(tmp_path)
    path = folder / f"{family}.safetensors"
    stock = UNet2DConditionModel.from_single_file(str(path), config=str(tmp_path), local_files_only=True)
    assert torch.equal(output(open_prior(path).load_unet()), output(stock))


def test_a_half_precision_file_is_read_in_float32(unets, tmp_path):
    path = tmp_path / "half.safetensors"
    half = {key: value.half() for key, value in in_ldm_keys(unets["sd1"]).items()}
    save_file(half, path)
    unet = open_prior(path).load_unet()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert torch.equal(unet.conv_in.weight, half[f"{UNET_PREFIX}input_blocks.0.0.weight"].float())


def test_training_does_not_write_to_the_file_nor_need_it(unets, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(in_ldm_keys(unets["sd1"]), path)
    unet = open_prior(path).load_unet()
    expected = output(unet)
    path.write_bytes(b"\0" * path.stat().st_size)  # the same file on disk: a memory map would see it
    assert torch.equal(output(unet), expected)


def test_the_fingerprint_names_the_weights(unets, tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    weights = in_ldm_keys(unets["sd1"])
    save_file(weights, paths[0])
    save_file({**weights, "first_stage_model.x": torch.zeros(1)}, paths[1], {"modelspec.title": "the same"})
    changed = weights[f"{UNET_PREFIX}middle_block.0.in_layers.2.bias"] + 1e-3
    save_file({**weights, f"{UNET_PREFIX}middle_block.0.in_layers.2.bias": changed}, paths[2])
    first, second, third = (open_prior(path).fingerprint for path in paths)
    assert first == second != third
    assert len(first) == 64


@pytest.mark.parametrize("change", ["first", "last", "shape", "dtype", "key"])
def test_what_a_fingerprint_sees(change):
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    before = fingerprint(weights)
    if change in ("first", "last"):
        weights["a"] = weights["a"].clone()
        weights["a"][0 if change == "first" else -1] += 1
    elif change == "shape":
        weights["a"] = weights["a"].reshape(10, 100)
    elif change == "dtype":
        weights["b"] = weights["b"].half()
    else:
        weights["c"] = weights.pop("a")
    assert fingerprint(weights) != before


# --- what it predicts


def write_folder(path, unet, scheduler=None):
    unet.save_pretrained(path / "unet")
    if scheduler is not None:
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return path


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, ("eps", False)),
        ({"_class_name": "PNDMScheduler"}, ("eps", False)),
        ({"prediction_type": "epsilon"}, ("eps", False)),
        ({"prediction_type": "v_prediction"}, ("v", False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v", True)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, ("flow", False)),
    ],
)
def test_the_prediction_of_a_folder(unets, tmp_path, scheduler, expected):
    prior = open_prior(write_folder(tmp_path, unets["sd1"], scheduler))
    assert (prior.prediction, prior.zero_terminal_snr) == expected


@pytest.mark.parametrize(
    ("keys", "metadata", "expected"),
    [
        ([], {}, ("eps", False)),
        (["v_pred"], {}, ("v", False)),
        (["v_pred", "ztsnr"], {}, ("v", True)),
        ([], {"modelspec.prediction_type": "v"}, ("v", False)),
        ([], {"modelspec.prediction_type": "epsilon"}, ("eps", False)),
    ],
)
def test_the_prediction_of_a_file(unets, tmp_path, keys, metadata, expected):
    path = tmp_path / "a.safetensors"
    bare = diffusers_to_ldm(unets["sdxl"].state_dict())
    save_file(bare | {key: torch.zeros(0) for key in keys}, path, metadata)
    prior = open_prior(path)
    assert (prior.prediction, prior.zero_terminal_snr) == expected


@pytest.mark.parametrize(("spread", "expected"), [(0.05, "eps"), (0.2, "v")])
@pytest.mark.parametrize("naming", ["LDM", "diffusers"])
def test_sd2_is_told_by_comfyuis_rule(tmp_path, spread, expected, naming):
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 4, "up_block_types": ["CrossAttnUpBlock2D"] * 4}
    unet = build("sd2", block_out_channels=[32] * 4, attention_head_dim=1, layers_per_block=2, **kinds)
    torch.manual_seed(0)
    bias = unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
    bias.data = torch.randn(32) * spread
    save_file(in_ldm_keys(unet) if naming == "LDM" else unet.state_dict(), tmp_path / "a.safetensors")
    assert open_prior(tmp_path / "a.safetensors").prediction == expected


# --- text


@pytest.mark.parametrize("number", range(len(PROMPTS)), ids=["the empty prompt", "a prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_what_comfyui_encodes(folder, comfyui, family, number):
    work, expected = comfyui
    tokenizer = Path((work / "tokenizer.txt").read_text()) if PROMPTS[number] else None
    text = open_prior(folder / f"{family}.safetensors").encode_prompt(PROMPTS[number], tokenizer=tokenizer)
    reference = expected[f"{family}.{number}"]
    assert text.context.dtype == torch.float32
    assert text.context.shape == (1, 77, LAYOUTS[family]["cross_attention_dim"])
    assert reference.std() > 0.1
    torch.testing.assert_close(text.context, reference, rtol=1e-3, atol=1e-4)
    if family == "sdxl":
        torch.testing.assert_close(text.pooled, expected[f"sdxl.{number}.pooled"], rtol=1e-3, atol=1e-4)
    else:
        assert text.pooled is None
    assert (expected[f"{family}.0"] - expected[f"{family}.1"]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_text_of_a_diffusers_folder(comfyui, tmp_path, unets, family):
    """The folder's own models, called as diffusers' pipelines call them."""
    work, _ = comfyui
    tokenizer = Path((work / "tokenizer.txt").read_text())
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    unets[family].save_pretrained(tmp_path / "unet")
    sizes = {"num_hidden_layers": 3, "max_position_embeddings": 77, "vocab_size": 49408, "intermediate_size": 256}
    torch.manual_seed(5)
    first = CLIPTextModel(CLIPTextConfig(hidden_size=64 if family == "sdxl" else 128, num_attention_heads=2, **sizes))
    first.eval().save_pretrained(tmp_path / "text_encoder", variant="fp16")
    # "a cat" and its padding: 49407 for CLIP-L, 0 for OpenCLIP
    ids = torch.tensor([[49406, 320, 2368, 49407] + [0 if family == "sd2" else 49407] * 73])
    found = first(ids, output_hidden_states=True)
    expected, pooled = found.last_hidden_state, None
    if family == "sdxl":
        config = CLIPTextConfig(hidden_size=128, num_attention_heads=2, projection_dim=128, **sizes)
        second = CLIPTextModelWithProjection(config).eval()
        second.save_pretrained(tmp_path / "text_encoder_2")
        ids[:, 4:] = 0
        other = second(ids, output_hidden_states=True)
        expected, pooled = torch.cat((found.hidden_states[-2], other.hidden_states[-2]), -1), other.text_embeds
    text = open_prior(tmp_path).encode_prompt("a cat")
    torch.testing.assert_close(text.context, expected)
    assert (text.pooled is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(text.pooled, pooled)


def test_the_empty_prompt_of_a_bare_text_encoder(folder, comfyui, tmp_path):
    """As ComfyUI's users have CLIP-L: a file of its own."""
    prefix = "cond_stage_model.transformer."
    checkpoint = load_file(folder / "sd1.safetensors")
    path = tmp_path / "clip_l.safetensors"
    save_file({key.removeprefix(prefix): value for key, value in checkpoint.items() if key.startswith(prefix)}, path)
    text = encode_prompt(path, "sd1", "", "model.text_encoder")
    torch.testing.assert_close(text.context, comfyui[1]["sd1.0"], rtol=1e-3, atol=1e-4)


def test_configs_of_the_published_text_encoders():
    """CLIP-L, OpenCLIP-H and bigG, as their folders on the hub say."""
    clip = {key.removeprefix("text_model."): shape for key, shape in layouts.clip_l().items()}
    found = CLIPTextConfig(**clip_config(clip, "quick_gelu"))
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    assert [getattr(found, key) for key in keys] == [768, 12, 12, 3072, "quick_gelu"]
    found = CLIPTextConfig(**open_clip_config(layouts.clip_g(), last_layer=True))
    assert [getattr(found, key) for key in keys] == [1280, 32, 20, 5120, "gelu"]
    assert found.projection_dim == 1280
    huge = {
        key: tuple(size * 1024 // 1280 for size in shape) if "token_embedding" not in key else (49408, 1024)
        for key, shape in layouts.clip_g().items()
        if not any(f"resblocks.{i}." in key for i in range(24, 32))
    }
    found = CLIPTextConfig(**open_clip_config(huge, last_layer=False))  # SD2's folder has 23 of the 24 layers too
    assert [getattr(found, key) for key in keys] == [1024, 23, 16, 4096, "gelu"]


# --- autoencoder


@pytest.mark.parametrize("where", ["checkpoint", "bare LDM", "bare diffusers", "early diffusers", "folder"])
def test_the_autoencoder_is_comfyuis(folder, comfyui, tmp_path, where):
    work, expected = comfyui
    ldm = load_file(work / "vae.safetensors")
    path = tmp_path / "vae.safetensors"
    prior = open_prior(folder / "sd1.safetensors")
    if where == "checkpoint":
        save_file(load_file(prior.path) | {f"first_stage_model.{key}": value for key, value in ldm.items()}, path)
        vae = open_prior(path).load_vae()
    elif where == "bare LDM":
        save_file(ldm, path)
        vae = prior.load_vae(path)
    else:
        save_file(ldm, path)
        first = prior.load_vae(path)
        if where == "folder":
            first.register_to_config(scaling_factor=0.5)
            first.save_pretrained(tmp_path / "model" / "vae")
            vae = prior.load_vae(tmp_path / "model")
        else:
            weights = first.state_dict()
            if where == "early diffusers":
                old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
                for new, name in old.items():
                    weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
                assert any(".proj_attn." in key for key in weights)
            save_file(weights, path)
            vae = prior.load_vae(path)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert vae.config.scaling_factor == (0.5 if where == "folder" else 0.18215)
    assert expected["mean"].std() > 0.05
    with torch.no_grad():
        mean = vae.encode(expected["picture"]).latent_dist.mean
        torch.testing.assert_close(mean, expected["mean"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(vae.decode(expected["mean"]).sample, expected["decoded"], rtol=1e-3, atol=1e-4)


def test_the_scaling_factor_is_the_familys(comfyui):
    work, _ = comfyui
    factors = {family: load_vae(work / "vae.safetensors", family, "x").config.scaling_factor for family in FAMILIES}
    assert factors == {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


# --- refusals: one sentence each


def refusal(call, *arguments):
    with pytest.raises(GuidanceError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", '"'))  # the way to convert a pickle ends in its command
    return message


def refused(tmp_path, weights):
    path = tmp_path / "a.safetensors"
    save_file(weights, path)
    message = refusal(open_prior, path)
    assert message.startswith(f"model.checkpoint {str(path)!r} ")
    return message.removeprefix(f"model.checkpoint {str(path)!r} ")


INPAINTING = "is an inpainting UNet of 9 input channels, expected 4; use the base model it was made from."
REFINER = "is SDXL's refiner, which cannot start from noise; use the SDXL base model."
IMAGES = "reads class labels or images (unCLIP), expected a text-to-image base model."
VECTOR = (
    "reads a vector of 1500 values beside the text, expected SDXL's pooled text and six sizes, more than 1536; use a "
    "base model."
)


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("sd1", {"in_channels": 9}, INPAINTING),
        ("sdxl", {"cross_attention_dim": 1280, "vector": 2560}, REFINER),
        ("sd1", {"class_embed_type": "projection", "vector": 2000}, IMAGES),
        ("sd2", {"class_embed_type": "projection", "vector": 1536, "cross_attention_dim": 1024}, IMAGES),
        ("sd2", {"class_embed_type": "projection", "vector": 2048, "cross_attention_dim": 1024}, IMAGES),
        ("sdxl", {"vector": 1500}, VECTOR),
    ],
    ids=["inpainting", "refiner", "labels", "unCLIP L", "unCLIP H", "another vector"],
)
def test_a_unet_that_is_no_base_model(tmp_path, family, more, said):
    more = {{"vector": "projection_class_embeddings_input_dim"}.get(key, key): value for key, value in more.items()}
    unet = build(family, **more)
    assert refused(tmp_path, in_ldm_keys(unet)) == said
    unet.save_pretrained(tmp_path / "f" / "unet")
    assert refusal(open_prior, tmp_path / "f") == f"model.checkpoint {str(tmp_path / 'f')!r} {said}"


def test_a_structure_that_diffusers_cannot_be(tmp_path):
    """KOALA's: the middle has another depth than the last resolution."""
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    weights = in_ldm_keys(build("sdxl", transformer_layers_per_block=[1, 2], **kinds))
    weights = {key: value for key, value in weights.items() if "middle_block.1.transformer_blocks.1." not in key}
    said = "has a structure that diffusers' UNet2DConditionModel cannot take (middle_block.1.transformer_blocks.1."
    assert refused(tmp_path, weights).startswith(said)


def test_a_null_text_file_is_no_prior(unets, tmp_path):
    ldm = diffusers_to_ldm(unets["sd1"].state_dict())
    names = [key.removesuffix(".norm2.bias") for key in ldm if key.endswith(".norm2.bias")]
    message = refused(tmp_path, fold(ldm, {name: torch.zeros(64 if "middle" not in name else 128) for name in names}))
    assert message.startswith("is a null-text UNet (folded), expected a prior, which reads text; ")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "it looks like a LoRA"),
        ("control_model.input_blocks.0.0.weight", "it looks like a ControlNet"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "it looks like a diffusion transformer"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "it looks like a diffusion transformer"),
        ("decoder.conv_in.weight", "it looks like a VAE"),
    ],
)
def test_another_kind_of_file(tmp_path, key, kind):
    assert kind in refused(tmp_path, {key: torch.zeros(1)})


def test_a_checkpoint_trained_the_edm_way(unets, tmp_path):
    message = refused(tmp_path, {**in_ldm_keys(unets["sdxl"]), "edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)})
    assert message == "was trained in the EDM way, expected an eps, v or flow model."


def test_a_missing_checkpoint(tmp_path):
    assert refusal(open_prior, tmp_path / "none.safetensors").startswith("model.checkpoint '")


def test_a_folder_of_something_else(tmp_path):
    assert refusal(open_prior, tmp_path) == (
        f"model.checkpoint {str(tmp_path)!r} is a folder without 'unet/config.json', expected a diffusers folder or a "
        ".safetensors file."
    )
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert refusal(open_prior, tmp_path) == (
        f"model.checkpoint {str(tmp_path)!r} has a unet of the class 'FluxTransformer2DModel', expected "
        "'UNet2DConditionModel'."
    )


def test_a_folder_of_pickles(unets, tmp_path):
    unets["sd1"].save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert "unet/diffusion_pytorch_model.bin is a pickle; expected .safetensors;" in refusal(open_prior, tmp_path)


def test_a_folder_with_a_file_cut_short(unets, tmp_path):
    unets["sd1"].save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(open_prior, tmp_path)
    assert message.startswith(
        f"model.checkpoint {str(tmp_path)!r}: unet/diffusion_pytorch_model.safetensors is cut short: "
    )


def test_a_folder_with_missing_weights(unets, tmp_path):
    unets["sd1"].save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_out.bias"]
    save_file(weights, path)
    assert refusal(open_prior(tmp_path).load_unet) == (
        f"model.checkpoint {str(tmp_path)!r} lacks weights of its UNet, first 'conv_out.bias'; download the folder "
        "again."
    )


def test_a_checkpoint_without_a_text_encoder(unets, tmp_path):
    save_file(in_ldm_keys(unets["sd2"]), tmp_path / "a.safetensors")
    assert refusal(open_prior(tmp_path / "a.safetensors").encode_prompt, "") == (
        f"model.checkpoint {str(tmp_path / 'a.safetensors')!r} holds no text encoder of the SD2.x kind, expected the "
        "prior's own; set model.text_encoder to a whole checkpoint or a diffusers folder of the same family."
    )


def test_the_text_encoder_of_another_family(folder):
    message = refusal(open_prior(folder / "sd2.safetensors").encode_prompt, "", folder / "sd1.safetensors")
    assert message.startswith(
        f"model.text_encoder {str(folder / 'sd1.safetensors')!r} holds no text encoder of the SD2.x"
    )


def test_a_text_encoder_of_another_width(folder, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file(random(clip_shapes(64, 1), "text_model."), path)
    assert refusal(open_prior(folder / "sd1.safetensors").encode_prompt, "", path) == (
        f"model.text_encoder {str(path)!r} gives text of the widths (64, 0), expected (128, 0) for the SD1.x prior "
        "'sd1.safetensors'; use the text encoder of that prior."
    )


def test_a_prompt_without_a_tokenizer(folder):
    message = refusal(open_prior(folder / "sd1.safetensors").encode_prompt, "a cat")
    assert message.startswith("model.tokenizer: ")
    assert message.endswith("ComfyUI ships one in comfy/sd1_tokenizer, a diffusers folder in tokenizer/.")


def test_a_prompt_that_is_too_long(folder, comfyui):
    tokenizer = Path((comfyui[0] / "tokenizer.txt").read_text())
    prior = open_prior(folder / "sd1.safetensors")
    assert refusal(prior.encode_prompt, "cat " * 76, None, tokenizer) == (
        f"The prompt {('cat ' * 10)!r} has 76 tokens, expected at most 75; shorten it."
    )
    assert prior.encode_prompt("cat " * 75, None, tokenizer).context.shape == (1, 77, 128)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_taesd_is_comfyuis(comfyui, folder, tmp_path, prefix):
    work, expected = comfyui
    path = tmp_path / "taesd.safetensors"
    weights = load_file(work / "taesd.safetensors")
    beside = {"cond_stage_model.x": torch.zeros(1)} if prefix else {}
    save_file({f"{prefix}{key}": value for key, value in weights.items()} | beside, path)
    vae = open_prior(folder / "sd1.safetensors").load_vae(path)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert expected["taesd.latent"].std() > 0.05
    encoded = vae.encode(expected["taesd.picture"]).latent_dist
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(encoded.mean, expected["taesd.latent"], **close)
    torch.testing.assert_close(encoded.mean * vae.config.scaling_factor, expected["taesd.seen"], **close)
    assert not encoded.std.any()
    decoded = vae.decode(expected["taesd.latent"]).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, expected["taesd.decoded"], **close)


@pytest.fixture
def taesd_file(tmp_path):
    """Write a TAESD in ComfyUI's keys with one scale and shift, or without."""
    weights = random({key: shape for key, shape in layouts.vae().items() if shape}, "")

    def write(**scale):
        path = tmp_path / f"taesd{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({**weights, **{key: torch.tensor(value) for key, value in scale.items()}}, path)
        return path

    return write


def test_scale_and_shift_of_a_taesd(taesd_file):
    """ComfyUI: latent = encoder / vae_scale + vae_shift; without them 1 and 0."""
    plain, scaled = (load_vae(path, "sd1", "") for path in (taesd_file(), taesd_file(vae_scale=0.5, vae_shift=0.3)))
    picture = torch.rand(1, 3, 32, 48) * 2 - 1
    mean = plain.encode(picture).latent_dist.mean
    assert mean.shape == (1, 4, 4, 6)
    torch.testing.assert_close(scaled.encode(picture).latent_dist.mean, mean / 0.5 + 0.3)
    torch.testing.assert_close(scaled.decode(mean / 0.5 + 0.3).sample, plain.decode(mean).sample)
    assert vae_fingerprint(plain) != vae_fingerprint(scaled)  # so a cache of the one is none of the other
    assert vae_fingerprint(load_vae(taesd_file(), "sd1", "")) == vae_fingerprint(plain)


def test_a_narrow_taesd_is_that_filled_up_with_zeros(tmp_path):
    """Encoder and decoder may be of different widths; nothing is normed, so that channels of zeros say nothing."""
    full = random({key: shape for key, shape in layouts.vae().items() if shape}, "")
    narrow = {"vae_scale": torch.tensor(0.5), "vae_shift": torch.tensor(0.3)}
    for key, tensor in full.items():
        width = 24 if "encoder" in key else 40
        narrow[key] = 0.1 * tensor[tuple(slice(width if side == 64 else side) for side in tensor.shape)]
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file(full_taesd(narrow), tmp_path / "full.safetensors")
    small, whole = (load_vae(tmp_path / f"{name}.safetensors", "sd1", "") for name in ("narrow", "full"))
    picture = torch.rand(1, 3, 32, 48) * 2 - 1
    latent = small.encode(picture).latent_dist.mean
    assert latent.std() > 0.01
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(whole.encode(picture).latent_dist.mean, latent, **close)
    torch.testing.assert_close(whole.decode(latent).sample, small.decode(latent).sample, **close)


def test_a_folder_with_diffusers_taesd(folder, tmp_path):
    torch.manual_seed(0)
    tiny = AutoencoderTiny().eval()
    tiny.save_pretrained(tmp_path / "vae")
    vae = open_prior(folder / "sd1.safetensors").load_vae(tmp_path)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = tiny.encode(picture).latents
        assert torch.equal(vae.encode(picture).latent_dist.mean, latents)
        assert torch.equal(vae.decode(latents).sample, tiny.decode(latents).sample)
    assert vae.config.scaling_factor == 1


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"taesd_decoder.1.weight": (1,)}, " holds half a TAESD: expected its encoder and decoder in one file"),
        ({"encoder.layers.0.weight": (1,)}, " holds the weights of a diffusers AutoencoderTiny (TAESD) without its"),
        (
            {"taesd_encoder.0.weight": (64, 3, 3, 3), "taesd_decoder.1.weight": (64, 4, 3, 3)},
            " holds a VAE of another kind, expected one of SD1.x, SD2.x or SDXL",
        ),
        ({"a": (1,)}, " holds no VAE: expected 'encoder.conv_in.weight', bare or below 'first_stage_model.'; set"),
        (
            {"encoder.conv_in.weight": (32, 3, 3, 3), "decoder.conv_in.weight": (1, 4), "encoder.x": (1,)},
            " holds a VAE of another kind, expected one of SD1.x, SD2.x or SDXL",
        ),
    ],
    ids=["half a TAESD", "TAESD without config", "cut TAESD", "none", "another"],
)
def test_no_such_autoencoder(folder, tmp_path, weights, said):
    path = tmp_path / "vae.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in weights.items()}, path)
    message = refusal(open_prior(folder / "sd1.safetensors").load_vae, path)
    assert message.startswith(f"model.vae {str(path)!r}{said}")


def test_an_autoencoder_of_sixteen_channels(folder, tmp_path):
    AutoencoderKL(latent_channels=16, block_out_channels=[32]).save_pretrained(tmp_path / "vae")
    message = refusal(open_prior(folder / "sd1.safetensors").load_vae, tmp_path)
    assert message == (
        f"model.vae {str(tmp_path)!r} makes latents of 16 channels, expected 4; use the VAE of an SD1.x model."
    )


def test_a_checkpoint_without_an_autoencoder(folder):
    path = folder / "sd1.safetensors"
    assert refusal(open_prior(path).load_vae).startswith(f"model.checkpoint {str(path)!r} holds no VAE: ")
