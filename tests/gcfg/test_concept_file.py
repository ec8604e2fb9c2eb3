"""Recognising, folding and compacting UNet files, on the small real-layout models."""

import zlib

import pytest
import torch
from comfyui_gcfg.gcfg.concept_file import (
    ConceptFile,
    compact,
    describe,
    features,
    fill_for_detection,
    fold,
    unet_in_ldm_keys,
    without_dead_weights,
)
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm
from comfyui_gcfg.testkit import layouts
from comfyui_gcfg.testkit.checks import refusal
from comfyui_gcfg.testkit.models import controlnet_state_dict, lora_state_dict, vae_state_dict

FAMILIES = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "unet.", "module."]


def stand_in(key, shape):
    """Random values of the shape the file format gives, but 16 of them where no function here looks at the sizes."""
    looked_at = any(part in key for part in (".attn2.", ".norm", "label_emb.0.0", "proj_in"))
    shape = shape if looked_at else (16, *(1 for _ in shape[1:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))).half()


@pytest.fixture(scope="module")
def ordinary():
    made = {
        f: {key: stand_in(key, shape) for key, shape in layouts.unet(layouts.FAMILIES[f]).items()} for f in FAMILIES
    }
    return made.__getitem__


@pytest.fixture(scope="module")
def constants(ordinary):
    """Some constant for each block; their values are the business of test_null_text."""

    def get(family):
        blocks = [key.removesuffix(".norm2.bias") for key in ordinary(family) if key.endswith(".norm2.bias")]
        return {block: stand_in(f"{block}.attn2.null_text_feature", (320,)) for block in blocks}

    return get


@pytest.fixture(scope="module")
def file_of(ordinary, constants):
    """A file by (family, form, prefix), built here without the functions under test."""

    def make(family, form="ordinary", prefix=""):
        sd = dict(ordinary(family))
        for block, feature in constants(family).items():
            if form == "folded":
                sd[f"{block}.attn2.to_v.weight"] = torch.zeros_like(sd[f"{block}.attn2.to_v.weight"])
                sd[f"{block}.attn2.to_out.0.bias"] = feature
            if form == "compact":
                sd = {k: v for k, v in sd.items() if not k.startswith((f"{block}.attn2.", f"{block}.norm2."))}
                sd[f"{block}.attn2.null_text_feature"] = feature.reshape(1, 1, -1)
        sd = {prefix + key: value for key, value in sd.items()}
        if prefix == "model.diffusion_model.":  # a whole checkpoint, with its averaged copy
            sd |= {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "model_ema.decay": torch.zeros(())}
        return sd

    return make


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["ordinary", "folded", "compact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_describe(file_of, ordinary, constants, family, form, prefix):
    found = describe(file_of(family, form, prefix))
    assert found == ConceptFile(form, "LDM", prefix, tuple(constants(family)), FAMILIES[family])
    unet = unet_in_ldm_keys(file_of(family, form, prefix), found)
    assert same(unet, file_of(family, form))


def test_the_authors_feature_may_be_flat_and_norm2_may_stay(file_of, constants):
    sd = file_of("sd15", "compact")
    for block, feature in constants("sd15").items():
        sd[f"{block}.attn2.null_text_feature"] = feature
        sd[f"{block}.norm2.weight"] = torch.ones_like(feature)
    assert describe(sd).form == "compact"
    assert same(features(sd), constants("sd15"))


def test_features_beside_dead_weights_count(file_of, ordinary, constants):
    sd = file_of("sd15", "compact") | ordinary("sd15")
    assert describe(sd).form == "compact"
    assert same(features(sd), constants("sd15"))
    assert same(dict(sorted(compact(sd).items())), dict(sorted(file_of("sd15", "compact").items())))


def test_one_zero_value_projection_does_not_make_a_folded_file(file_of, ordinary):
    sd = ordinary("sdxl") | {}
    first = next(key for key in sd if key.endswith("attn2.to_v.weight"))
    sd[first] = torch.zeros_like(sd[first])
    assert describe(sd).form == "ordinary"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_other_dtypes_are_recognised(file_of, dtype):
    for form in ("ordinary", "folded", "compact"):
        assert describe({k: v.to(dtype) for k, v in file_of("sd15", form).items()}).form == form


def test_context_dim_of_a_compact_file_is_what_its_metadata_says(file_of):
    sd = file_of("sd15", "compact")
    assert describe(sd, {"gcfg.context_dim": "640"}).context_dim == 640
    assert describe(sd, {"gcfg.context_dim": "wide"}).context_dim == 768


def test_the_sdxl_refiner_is_told_by_its_pooled_vector(file_of):
    sd = file_of("sdxl", "compact")
    sd["label_emb.0.0.weight"] = torch.zeros(1280, 2560)
    assert describe(sd).context_dim == 1280


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_fold_and_compact_are_inverse_of_each_other(file_of, constants, family, prefix):
    folded = fold(file_of(family, "ordinary", prefix), constants(family))
    assert same(folded, file_of(family, "folded", prefix))
    assert same(features(folded), constants(family))
    small = compact(folded)
    assert same(dict(sorted(small.items())), dict(sorted(file_of(family, "compact", prefix).items())))
    assert same(compact(small), small)
    assert same(features(small), constants(family))
    again = fold(small, features(small))
    assert describe(again).form == "folded"
    assert same(features(again), constants(family))
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in folded.items()}
    assert all(value.is_contiguous() for value in again.values()), "safetensors saves contiguous tensors only"


def test_fold_leaves_its_input_alone(ordinary, constants):
    before = {key: value.clone() for key, value in ordinary("sd15").items()}
    fold(ordinary("sd15"), constants("sd15"))
    assert same(before, ordinary("sd15"))


def test_fill_for_detection_takes_no_memory(file_of, ordinary):
    filled = fill_for_detection(file_of("sdxl", "compact"))
    added = {
        key: value for key, value in filled.items() if key in ordinary("sdxl") and key not in file_of("sdxl", "compact")
    }
    assert {key: value.shape for key, value in added.items()} == {
        key: value.shape for key, value in ordinary("sdxl").items() if ".attn2." in key or ".norm2." in key
    }
    assert all(value.untyped_storage().nbytes() <= 2 for value in added.values())
    assert all(value.dtype == torch.float16 for value in added.values())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", ["folded", "compact"])
def test_without_dead_weights_only_what_tells_the_family_is_left(file_of, ordinary, form, prefix):
    sd = file_of("sdxl", form, prefix)
    left = without_dead_weights(sd, describe(sd))
    dead = {prefix + key for key in ordinary("sdxl") if ".attn2." in key or ".norm2." in key}
    marks = {key for key in dead if key.endswith(".transformer_blocks.0.attn2.to_k.weight")}
    beside = {key for key in sd if not key.startswith(prefix)}
    assert set(left) == {prefix + key for key in ordinary("sdxl")} - dead | marks | beside
    assert {left[key].shape for key in marks} == {ordinary("sdxl")[key.removeprefix(prefix)].shape for key in marks}
    assert all(left[key].untyped_storage().nbytes() <= 2 for key in marks)
    assert all(value is sd[key] for key, value in left.items() if key not in marks)


# The published layouts of SD1.5's diffusers UNet and its LDM names, written down by hand from the two file formats.
DIFFUSERS_TO_LDM = {
    "conv_in.weight": "input_blocks.0.0.weight",
    "time_embedding.linear_1.bias": "time_embed.0.bias",
    "time_embedding.linear_2.weight": "time_embed.2.weight",
    "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
    "down_blocks.0.resnets.1.conv1.bias": "input_blocks.2.0.in_layers.2.bias",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight": (
        "input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
    ),
    "down_blocks.0.attentions.1.norm.weight": "input_blocks.2.1.norm.weight",
    "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
    "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
    "down_blocks.1.resnets.1.norm1.weight": "input_blocks.5.0.in_layers.0.weight",
    "down_blocks.1.attentions.0.proj_in.weight": "input_blocks.4.1.proj_in.weight",
    "down_blocks.1.attentions.1.proj_in.weight": "input_blocks.5.1.proj_in.weight",
    "mid_block.resnets.0.time_emb_proj.weight": "middle_block.0.emb_layers.1.weight",
    "mid_block.attentions.0.transformer_blocks.0.norm2.weight": "middle_block.1.transformer_blocks.0.norm2.weight",
    "mid_block.resnets.1.norm2.bias": "middle_block.2.out_layers.0.bias",
    "up_blocks.0.resnets.0.conv2.weight": "output_blocks.0.0.out_layers.3.weight",
    "up_blocks.0.resnets.1.conv2.weight": "output_blocks.1.0.out_layers.3.weight",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.1.1.conv.weight",
    "up_blocks.1.resnets.0.conv2.weight": "output_blocks.2.0.out_layers.3.weight",
    "up_blocks.1.resnets.1.conv2.weight": "output_blocks.3.0.out_layers.3.weight",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.null_text_feature": (
        "output_blocks.3.1.transformer_blocks.0.attn2.null_text_feature"
    ),
    "up_blocks.1.attentions.0.proj_out.bias": "output_blocks.2.1.proj_out.bias",
    "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.3.2.conv.bias",
    "conv_norm_out.weight": "out.0.weight",
    "conv_out.bias": "out.2.bias",
    "add_embedding.linear_1.weight": "label_emb.0.0.weight",
    "class_embedding.linear_2.bias": "label_emb.0.2.bias",
    "position_ids": "position_ids",
}


def test_diffusers_keys_become_ldm_keys():
    renamed = diffusers_to_ldm({key: key for key in DIFFUSERS_TO_LDM})
    assert renamed == {ldm: key for key, ldm in DIFFUSERS_TO_LDM.items()}


def test_a_middle_without_attention_is_counted_without_gaps():
    keys = dict.fromkeys(["mid_block.resnets.0.conv1.bias", "mid_block.resnets.1.conv1.bias"])
    assert list(diffusers_to_ldm(keys)) == ["middle_block.0.in_layers.2.bias", "middle_block.1.in_layers.2.bias"]


SOURCE = "Load Concept UNet: unet_name 'x.safetensors'"


def told(sd):
    return refusal(describe, sd, source=SOURCE)


NO_UNET = (
    f"{SOURCE} holds no UNet: expected 'input_blocks.0.0.weight' (LDM) or 'conv_in.weight' (diffusers) and what "
    "belongs to it, bare or below 'model.diffusion_model.', found "
)


def test_no_keys_at_all():
    assert told({}) == NO_UNET + "no keys."


def test_a_lora_is_named(ordinary):
    sd = lora_state_dict(ordinary("sd15"))
    first = ", ".join(repr(key) for key in list(sd)[:3])
    assert told(sd) == (
        f"{NO_UNET}{first} and {len(sd) - 3} more keys (it looks like a LoRA; load the UNet and apply it with a LoRA "
        "loader)."
    )


def test_other_files_are_named():
    assert told(controlnet_state_dict()).endswith("(it looks like a ControlNet; load it with a ControlNet loader).")
    assert told({"double_blocks.0.img_attn.proj.weight": 0}).endswith(
        "found 'double_blocks.0.img_attn.proj.weight' (it looks like a diffusion transformer, which has no null-text "
        "form here)."
    )
    assert told({"text_model.final_layer_norm.bias": 0}).endswith(
        "(it looks like a text encoder; load it with a CLIP loader)."
    )
    assert told({"decoder.conv_in.weight": 0}).endswith("(it looks like a VAE; load it with a VAE loader).")
    assert told(vae_state_dict()).startswith(NO_UNET)


def test_the_averaged_copy_of_a_checkpoint_is_not_taken(ordinary):
    sd = {"model_ema.diffusion_model" + key.replace(".", ""): value for key, value in ordinary("sd15").items()}
    assert told(sd).startswith(NO_UNET)


def test_a_unet_without_transformers():
    sd = {"input_blocks.0.0.weight": 0, "out.2.weight": 0}
    assert told(sd) == (
        f"{SOURCE} has a UNet without 'transformer_blocks.N' keys, expected one with cross-attention; "
        "use a UNet of the SD1.x, SD2.x or SDXL family."
    )


def test_missing_attention_without_features_lists_what_was_expected_and_found(file_of):
    sd = {key: value for key, value in file_of("sd15", "compact").items() if "null_text" not in key}
    block = "input_blocks.1.1.transformer_blocks.0.attn2"
    blocks = len(describe(file_of("sd15")).blocks)
    assert told(sd) == (
        f"{SOURCE} is neither an ordinary nor a null-text UNet: expected '{block}.to_q.weight', '{block}.to_k.weight', "
        f"'{block}.to_v.weight' and {5 * blocks - 3} more keys, of which {5 * blocks} are missing, first "
        f"'{block}.to_q.weight'; found no keys of attn2; export the file again."
    )


def test_a_file_with_some_features_lists_the_missing_one(file_of):
    sd = file_of("sd15", "compact")
    last = [key for key in sd if "null_text" in key][-1]
    del sd[last]
    message = told(sd)
    assert f"of which 1 are missing, first {last!r}; found 'input_blocks.1.1." in message
    assert message.startswith(f"{SOURCE} is neither an ordinary nor a null-text UNet: expected ")


def test_a_feature_of_another_width(file_of):
    sd = file_of("sd15", "compact")
    key = "input_blocks.1.1.transformer_blocks.0.attn2.null_text_feature"
    sd[key] = torch.zeros(1, 1, 640)
    assert told(sd) == (f"{SOURCE}: {key!r} has the shape (1, 1, 640), expected (1, 1, 320); export the file again.")


def test_an_ordinary_unet_has_no_features(ordinary):
    for function in (features, compact):
        assert refusal(function, ordinary("sd15")) == (
            "The file is an ordinary UNet, expected a null-text one (folded or compact); "
            "train one, or use the Null-Text Patch on the loaded model."
        )


def test_a_fine_tuned_concept_keeps_its_constants(file_of, constants):
    """What training changes is everything but the dead layers and the constants."""
    tuned = {k: w if "null_text" in k else w + 1 for k, w in file_of("sd15", "compact").items()}
    assert same(features(fold(tuned, features(tuned))), constants("sd15"))
