"""LDM's and diffusers' UNet names, both ways, for the published layouts of SD1.5, SD2.1 and SDXL.

golden/*.txt lists them: LDM module, diffusers module, shape of the weight, "+b" where there is a bias of its length;
"[n]" stands for each of 0 ... n-1. The LDM names and shapes were taken from ComfyUI's UNetModel, built with the
published configs (v1-inference.yaml, v2-inference-v.yaml, SDXL's transformer depths 0, 2, 10); the diffusers name of
each is where diffusers' convert_ldm_unet_checkpoint put it. The second step is repeated here.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm, ldm_to_diffusers
from comfyui_gcfg.training.prior.architecture import family_of, pooled_width, unet_config
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}  # parameters
LAYOUTS = list(PUBLISHED)

# What the published diffusers folders say in unet/config.json, where it is not the class's default.
CONFIGS = {
    "sd15": {
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "use_linear_projection": False,
        "transformer_layers_per_block": 1,
        "block_out_channels": [320, 640, 1280, 1280],
    },
    "sd21": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "transformer_layers_per_block": 1,
        "block_out_channels": [320, 640, 1280, 1280],
    },
    "sdxl": {
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def golden(layout):
    """Return (LDM key, diffusers key, shape) of every tensor."""
    rows = []
    for line in (Path(__file__).parent / "golden" / f"{layout}.txt").read_text().splitlines():
        ldm, diffusers, sizes = line.split()
        shape = tuple(int(size) for size in sizes.removesuffix("+b").split("x"))
        repeats = re.search(r"\[(\d+)\]", ldm)
        for i in range(int(repeats[1]) if repeats else 1):
            names = [re.sub(r"\[\d+\]", str(i), name) for name in (ldm, diffusers)]
            rows.append((f"{names[0]}.weight", f"{names[1]}.weight", shape))
            if sizes.endswith("+b"):
                rows.append((f"{names[0]}.bias", f"{names[1]}.bias", shape[:1]))
    return rows


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def test_the_lists_are_whole(layout):
    rows = golden(layout)
    assert sum(math.prod(shape) for _, _, shape in rows) == PUBLISHED[layout]
    assert len({row[0] for row in rows}) == len({row[1] for row in rows}) == len(rows)


def test_the_lists_are_what_diffusers_own_converter_does(layout):
    rows = golden(layout)
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if layout == "sdxl" else None}
    converted = convert_ldm_unet_checkpoint({f"model.diffusion_model.{ldm}": ldm for ldm, _, _ in rows}, config)
    assert converted == {diffusers: ldm for ldm, diffusers, _ in rows}


def test_diffusers_to_ldm(layout):
    rows = golden(layout)
    assert diffusers_to_ldm({name: name for _, name, _ in rows}) == {ldm: name for ldm, name, _ in rows}


def test_ldm_to_diffusers(layout):
    rows = golden(layout)
    found = ldm_to_diffusers({ldm: ldm for ldm, _, _ in rows}, [name for _, name, _ in rows])
    assert found == {name: ldm for ldm, name, _ in rows}


def test_there_and_back(layout):
    names = [name for _, name, _ in golden(layout)]
    assert list(ldm_to_diffusers(diffusers_to_ldm({name: name for name in names}), names).items()) == [
        (name, name) for name in names
    ]


def test_a_null_text_feature_is_renamed_with_its_block():
    names = [name for _, name, _ in golden("sd15") if "attn2" not in name and "transformer_blocks.0.norm2" not in name]
    key = "up_blocks.3.attentions.2.transformer_blocks.0.attn2.null_text_feature"
    ldm = "output_blocks.11.1.transformer_blocks.0.attn2.null_text_feature"
    assert diffusers_to_ldm(dict.fromkeys([*names, key]))[ldm] is None
    assert ldm_to_diffusers({ldm: 1, "v_pred": 2}, [*names, key]) == {key: 1, "v_pred": 2}


def rebuilt(config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def shapes_of(unet):
    return {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}


def test_the_config_of_a_published_layout(layout):
    rows = golden(layout)
    config = unet_config({ldm: shape for ldm, _, shape in rows})
    assert {key: config[key] for key in CONFIGS[layout]} == CONFIGS[layout]
    assert shapes_of(rebuilt(config)) == {name: shape for _, name, shape in rows}
    assert family_of(config) == {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[layout]
    assert pooled_width(config) == (1280 if layout == "sdxl" else 0)


ACROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def structure(levels, **more):
    """Return a configuration from (channels, has attention) per level."""
    kinds = [ACROSS if attention else PLAIN for _, attention in levels]
    return {
        "block_out_channels": [width for width, _ in levels],
        "down_block_types": [kind[0] for kind in kinds],
        "up_block_types": [kind[1] for kind in reversed(kinds)],
        "cross_attention_dim": 40,
        "attention_head_dim": 8,
        **more,
    }


SDXL_LIKE = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}


@pytest.mark.parametrize(
    "config",
    [
        structure([(32, True)], layers_per_block=1),
        structure([(32, True), (64, True), (64, False)], layers_per_block=3),
        structure([(32, False), (64, True)], layers_per_block=[1, 2]),
        structure(
            [(64, True), (128, True)],
            layers_per_block=1,
            use_linear_projection=True,
            attention_head_dim=[1, 2],
            transformer_layers_per_block=[2, 3],
        ),
        structure(  # SSD-1B's: other depths on the way up, no attention in the middle
            [(64, False), (64, True), (128, True)],
            layers_per_block=2,
            attention_head_dim=[1, 1, 2],
            transformer_layers_per_block=[1, [2, 2], [4, 4]],
            reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1],
            mid_block_type="UNetMidBlock2D",
            projection_class_embeddings_input_dim=1536 + 20,
            **SDXL_LIKE,
        ),
        structure([(32, True), (32, False)], layers_per_block=1, transformer_layers_per_block=[1, 3]),
        structure([(32, True)], layers_per_block=2, mid_block_type=None),
    ],
    ids=["one level", "three levels", "uneven layers", "linear", "SSD-1B", "deeper middle", "no middle"],
)
def test_the_config_of_any_structure_diffusers_can_be(config):
    unet = rebuilt(config)
    found = rebuilt(unet_config(diffusers_to_ldm(shapes_of(unet))))
    assert shapes_of(found) == shapes_of(unet)
    heads = [
        [module.heads for name, module in net.named_modules() if name.endswith(("attn1", "attn2"))]
        for net in (found, unet)
    ]
    assert heads[0] == heads[1]


def test_a_unet_without_attention_has_no_config():
    unet = rebuilt(structure([(32, False), (32, False)], mid_block_type="UNetMidBlock2D"))
    with pytest.raises(GuidanceError, match=r"^The UNet has no cross-attention, expected .*family\.$"):
        unet_config(diffusers_to_ldm(shapes_of(unet)))
