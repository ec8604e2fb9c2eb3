"""A widened network is the narrow one: diffusers' own classes at both widths, in float64."""

import copy
import re

import pytest
import torch
from comfyui_gcfg.evaluation.controlnet import load_controlnet
from comfyui_gcfg.gcfg.concept_file import fold
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm, ldm_to_diffusers
from comfyui_gcfg.reproduction.prior import CHANNELS
from comfyui_gcfg.reproduction.world import controlnet_to_ldm
from comfyui_gcfg.testkit.widen import widen, widen_lora
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file

FACTOR = 5


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(3, 77, 768, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 417, 999]), context


def wide_twin(network):
    """A network of the same class and five times the width, with weights of its own."""
    config = {**network.config, "block_out_channels": [FACTOR * c for c in network.config.block_out_channels]}
    return type(network).from_config(config).double().eval()


def outputs(result):
    return (
        [result.sample] if hasattr(result, "sample") else [*result.down_block_res_samples, result.mid_block_res_sample]
    )


def test_a_widened_unet_predicts_the_same(unet, inputs):
    wide = wide_twin(unet)
    assert isinstance(wide, UNet2DConditionModel)
    assert wide.config.block_out_channels[0] == 320
    state_dict = widen({k: w.double() for k, w in diffusers_to_ldm(unet.state_dict()).items()}, FACTOR)
    wide.load_state_dict(ldm_to_diffusers(state_dict, wide.state_dict()))
    with torch.no_grad():
        expected, found = copy.deepcopy(unet).double()(*inputs).sample, wide(*inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # widened weights are float32
    assert expected.std() > 0.1


def test_a_widened_concept_model_keeps_its_constants(unet, inputs):
    """Folded: no text, and a constant in every cross-attention's bias."""
    blocks = [
        name.removesuffix(".attn2.to_v.weight")
        for name in diffusers_to_ldm(unet.state_dict())
        if name.endswith("attn2.to_v.weight")
    ]
    constants = {
        block: torch.randn(CHANNELS, generator=torch.Generator().manual_seed(i)) for i, block in enumerate(blocks)
    }
    folded = fold(diffusers_to_ldm(unet.state_dict()), constants)
    narrow, wide = copy.deepcopy(unet).double(), wide_twin(unet)
    narrow.load_state_dict(ldm_to_diffusers(folded, narrow.state_dict()))
    wide.load_state_dict(ldm_to_diffusers(widen(folded, FACTOR), wide.state_dict()))
    x, t, context = inputs
    with torch.no_grad():
        expected, found = narrow(x, t, context).sample, wide(x, t, -context).sample
        with_text = copy.deepcopy(unet).double()(x, t, context).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (expected - with_text).abs().max() > 0.01


def test_a_widened_lora_changes_the_wide_unet_as_the_narrow_one_its_own(unet, inputs):
    """Merged by hand into both: W + alpha / rank * up down, for every attention projection."""
    rank, alpha, generator = 4, 2, torch.Generator().manual_seed(2)
    projection = re.compile(r"(.+attn[12]\.to_(?:q|k|v|out\.0))\.weight")
    names = [found.group(1) for name in unet.state_dict() if (found := projection.fullmatch(name))]
    keys = {name: "lora_unet_" + name.replace(".", "_") for name in names}
    lora = {}
    for name, key in keys.items():
        out, width = unet.get_submodule(name).weight.shape
        lora[f"{key}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        lora[f"{key}.lora_down.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        lora[f"{key}.alpha"] = torch.tensor(alpha)

    def merged(network, weights):
        for name, key in keys.items():
            up, down = (weights[f"{key}.lora_{half}.weight"].double() for half in ("up", "down"))
            network.get_submodule(name).weight.data += weights[f"{key}.alpha"] / rank * up @ down
        return network

    narrow, wide = copy.deepcopy(unet).double(), wide_twin(unet)
    state_dict = widen({k: w.double() for k, w in diffusers_to_ldm(unet.state_dict()).items()}, FACTOR)
    wide.load_state_dict(ldm_to_diffusers(state_dict, wide.state_dict()))
    with torch.no_grad():
        without = narrow(*inputs).sample
        expected = merged(narrow, lora)(*inputs).sample
        found = merged(wide, widen_lora(lora, FACTOR))(*inputs).sample
    assert len(names) == 8 * 7  # two attentions of four projections in each of seven transformers
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (expected - without).abs().max() > 0.01


def test_a_widened_controlnet_gives_the_same_residuals_repeated(controlnet, inputs):
    wide = wide_twin(controlnet)
    ldm = {k.removeprefix("control_model."): w.double() for k, w in controlnet_to_ldm(controlnet.state_dict()).items()}
    names = {v: k for k, v in controlnet_to_ldm({name: name for name in wide.state_dict()}).items()}
    widened = widen(ldm, FACTOR)
    wide.load_state_dict({name: widened[key.removeprefix("control_model.")] for name, key in names.items()})
    hint = torch.rand(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = outputs(copy.deepcopy(controlnet).double()(*inputs, controlnet_cond=hint))
        found = outputs(wide(*inputs, controlnet_cond=hint))
    for narrow, repeated in zip(expected, found, strict=True):
        assert narrow.std() > 1e-3
        torch.testing.assert_close(repeated, narrow.repeat_interleave(FACTOR, dim=1), rtol=1e-5, atol=1e-6)


def test_a_controlnet_in_published_keys_is_what_diffusers_reads(controlnet, unet, inputs, tmp_path):
    """diffusers' own converter reads the file back into the same network."""
    save_file(
        {k: w.contiguous() for k, w in controlnet_to_ldm(controlnet.state_dict()).items()}, tmp_path / "c.safetensors"
    )
    read = load_controlnet(tmp_path / "c.safetensors", unet.config, "the file")
    assert isinstance(read, ControlNetModel)
    hint = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    x, t, context = inputs
    with torch.no_grad():
        for a, b in zip(
            outputs(controlnet(x.float(), t, context.float(), controlnet_cond=hint)),
            outputs(read(x.float(), t, context.float(), controlnet_cond=hint)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
