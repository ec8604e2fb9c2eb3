"""The null-text network made from a prior: the constants, the conversion, and how far it starts from the prior."""

import math

import pytest
import torch
from comfyui_gcfg.gcfg.concept_file import compact, fold
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.null_text import cross_attention_blocks, is_null_text
from comfyui_gcfg.gcfg.unet_keys import diffusers_to_ldm
from comfyui_gcfg.training.concept import drift, drift_table, null_text_features, predict, to_null_text
from comfyui_gcfg.training.prior.architecture import unet_config
from comfyui_gcfg.training.prior.text_encoder import Conditions
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

SD1 = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 40,
    "attention_head_dim": 8,
}
SDXL = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 40,
    "attention_head_dim": [1, 1],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 20,
}


def unet_of(config, seed=0):
    """A UNet whose text matters: the default initialisation makes attention all but uniform."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn2.to_" in name and parameter.ndim == 2:
                parameter.normal_(std=2 / math.sqrt(parameter.shape[1]))
    return unet


@pytest.fixture
def unet():
    return unet_of(SD1)


@pytest.fixture
def empty():
    torch.manual_seed(7)
    return Conditions(torch.randn(1, 77, 40))


@pytest.fixture
def noised():
    """Three batches of two latents, over all timesteps."""
    torch.manual_seed(8)
    return [(torch.randn(2, 4, 8, 8), torch.tensor(t)) for t in ([0, 99], [100, 550], [551, 999])]


def by_hand(unet, empty, batches):
    """F_null = mean over batches, images and pixels of softmax(q k^T / sqrt(d)) v W + b, in float64."""
    inputs = {}
    blocks = cross_attention_blocks(unet)
    for name, block in blocks.items():
        block.norm2.register_forward_hook(lambda module, args, out, name=name: inputs.setdefault(name, []).append(out))
    for x, t in batches:
        with torch.no_grad():
            unet(x, t, encoder_hidden_states=empty.context.expand(len(x), -1, -1))
    found = {}
    for name, block in blocks.items():
        attn2, e = block.attn2, empty.context[0].double()
        wq, wk, wv, wo = (
            layer.weight.detach().double() for layer in (attn2.to_q, attn2.to_k, attn2.to_v, attn2.to_out[0])
        )
        width, heads = wq.shape[0], attn2.heads
        d = width // heads
        total = torch.zeros(width, dtype=torch.float64)
        pixels = 0
        for x in torch.cat(inputs[name]).double():  # (pixels, C)
            out = torch.zeros(len(x), width, dtype=torch.float64)
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                q, k, v = x @ wq[part].T, e @ wk[part].T, e @ wv[part].T
                out[:, part] = torch.softmax(q @ k.T / math.sqrt(d), dim=-1) @ v
            total += (out @ wo.T + attn2.to_out[0].bias.detach().double()).sum(0)
            pixels += len(x)
        found[name] = total / pixels
    return found


@pytest.mark.parametrize("batches", [1, 3])
def test_attention_mean_is_the_mean_of_the_real_attention(unet, empty, noised, batches):
    found = null_text_features(unet, "attention_mean", empty, noised[:batches])
    expected = by_hand(unet_of(SD1), empty, noised[:batches])
    uniform = null_text_features(unet, "uniform_mean", empty)
    assert found.keys() == expected.keys()
    for name, feature in found.items():
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature.double(), expected[name], rtol=1e-4, atol=1e-5)
        assert (feature - uniform[name]).abs().max() > 1e-2  # the test can tell it from the other reading


def test_uniform_mean_is_the_prior_reading_the_mean_token(unet, empty, noised):
    """Softmax over one key is 1, so a prompt of one token, the mean of the null tokens, is uniform attention."""
    one_token = Conditions(empty.context.mean(dim=1, keepdim=True))
    with torch.no_grad():
        expected = [predict(unet, x, t, one_token) for x, t in noised]
    to_null_text(unet, null_text_features(unet, "uniform_mean", empty))
    for (x, t), reference in zip(noised, expected, strict=True):
        torch.testing.assert_close(predict(unet, x, t, Conditions.without_text(40)), reference, rtol=1e-4, atol=1e-5)


def test_zero_is_the_prior_without_cross_attention(unet, noised):
    """With to_v and the bias zero, whatever the text, cross-attention adds nothing."""
    silent = unet_of(SD1)
    for block in cross_attention_blocks(silent).values():
        torch.nn.init.zeros_(block.attn2.to_v.weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    x, t = noised[0]
    with torch.no_grad():
        expected = predict(silent, x, t, Conditions(torch.randn(1, 5, 40)))
    to_null_text(unet, null_text_features(unet, "zero"))
    torch.testing.assert_close(predict(unet, x, t, Conditions.without_text(40)), expected, rtol=1e-4, atol=1e-5)


def ldm_file(path, form, config=SD1):
    """Write a null-text file in LDM keys; return its constants in the order of the blocks in the file."""
    ordinary = diffusers_to_ldm(unet_of(config, seed=3).state_dict())
    names = [key.removesuffix(".norm2.bias") for key in ordinary if key.endswith(".norm2.bias")]
    torch.manual_seed(4)
    constants = {name: torch.randn(ordinary[f"{name}.norm2.bias"].shape) for name in names}
    folded = fold(ordinary, constants)
    save_file(folded if form == "folded" else compact(folded), path)
    return constants


@pytest.mark.parametrize("form", ["folded", "compact"])
def test_constants_of_a_file_in_ldm_keys(unet, tmp_path, form):
    path = tmp_path / "concept.safetensors"
    expected = ldm_file(path, form)
    found = null_text_features(unet, str(path))
    in_ldm = {
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
    }
    assert {name: feature.tolist() for name, feature in found.items()} == {
        f"{name}.transformer_blocks.0": expected[f"{ldm}.transformer_blocks.0"].tolist() for name, ldm in in_ldm.items()
    }


def test_constants_of_a_file_in_diffusers_keys(unet, empty, tmp_path):
    constants = null_text_features(unet, "uniform_mean", empty)
    other = unet_of(SD1, seed=2)
    to_null_text(other, constants)
    save_file(other.state_dict(), tmp_path / "a.safetensors")
    found = null_text_features(unet, str(tmp_path / "a.safetensors"))
    assert found.keys() == constants.keys()
    assert all(torch.equal(found[name], constants[name]) for name in found)


def test_a_mistyped_mode_is_told_the_modes(unet, tmp_path):
    with pytest.raises(GuidanceError) as caught:
        null_text_features(unet, str(tmp_path / "unform_mean"))
    assert str(caught.value) == (
        "model.null_text: 'unform_mean' is neither 'uniform_mean', 'attention_mean', 'zero' nor a file, at "
        f"{str(tmp_path / 'unform_mean')!r}."
    )


def test_a_file_of_another_architecture(unet, tmp_path):
    path = tmp_path / "other.safetensors"
    ldm_file(path, "compact", SDXL)
    with pytest.raises(GuidanceError) as caught:
        null_text_features(unet, str(path))
    assert str(caught.value) == (
        f"model.null_text {str(path)!r} belongs to another architecture: 8 blocks with 512 constants, expected the "
        "prior's 4 blocks with 160; name one of this prior's family."
    )


def test_an_ordinary_file_has_no_constants(unet, tmp_path):
    save_file(unet.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(GuidanceError, match=r"^model\.null_text '.*a\.safetensors' is an ordinary UNet"):
        null_text_features(unet, str(tmp_path / "a.safetensors"))


def test_what_sd15_loses():
    """The figures of the design: 43,987,520 of 859,520,964 parameters go, attn2 and norm2; 12,480 constants come."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # the class's defaults are SD1.5 but for this
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    with torch.no_grad():
        to_null_text(unet, null_text_features(unet, "zero"))
    trained = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    assert trained == 859_520_964 - 43_987_520
    assert sum(parameter.numel() for parameter in unet.parameters()) == trained + 12_480


def test_gradients_reach_every_trained_parameter(unet, empty, noised):
    constants = null_text_features(unet, "uniform_mean", empty)
    to_null_text(unet, constants)
    x, t = noised[0]
    predict(unet, x, t, Conditions.without_text(40)).square().mean().backward()
    fixed = {name for name, parameter in unet.named_parameters() if not parameter.requires_grad}
    assert fixed == {f"{name}.attn2.null_text_feature" for name in constants}
    for name, parameter in unet.named_parameters():
        assert (parameter.grad is None) == (name in fixed), name
        assert name in fixed or parameter.grad.abs().max() > 0, name


def test_constants_are_trained_on_request(unet, empty, noised):
    to_null_text(unet, null_text_features(unet, "uniform_mean", empty), trainable=True)
    x, t = noised[0]
    predict(unet, x, t, Conditions.without_text(40)).square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_drift_by_hand(unet, empty, noised):
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    constants = null_text_features(unet, "uniform_mean", empty)
    rows = drift(unet, constants, empty, noised)
    assert not is_null_text(unet)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())

    converted = unet_of(SD1)
    to_null_text(converted, constants)
    expected = {}
    for x, t in noised:
        for i in range(2):
            one = x[i : i + 1], t[i : i + 1]
            ours = predict(converted, *one, Conditions.without_text(40)).detach()
            theirs = predict(unet, *one, empty).detach()
            sums = expected.setdefault(int(t[i]) // 100, [0, 0.0, 0.0])
            sums[0] += 1
            sums[1] += float((ours - theirs).square().sum())
            sums[2] += float(theirs.square().sum())
    assert [(row.first, row.last, row.samples) for row in rows] == [
        (100 * i, 100 * i + 99, n) for i, (n, _, _) in sorted(expected.items())
    ]
    assert [row.samples for row in rows] == [2, 1, 2, 1]
    for row, (_, (_, difference, reference)) in zip(rows, sorted(expected.items()), strict=True):
        assert row.distance == pytest.approx(math.sqrt(difference / reference), rel=1e-3)
        assert row.distance > 1e-3
    assert drift_table(rows).splitlines()[1:] == [f"{row.first:>4}-{row.last:<4}  {row.distance:.4f}" for row in rows]


def test_no_drift_where_text_changes_nothing(unet, empty, noised):
    for block in cross_attention_blocks(unet).values():
        torch.nn.init.zeros_(block.attn2.to_v.weight)
    rows = drift(unet, null_text_features(unet, "uniform_mean", empty), empty, noised)
    assert [row.distance for row in rows] == [pytest.approx(0, abs=1e-6)] * 4


def test_sdxl_is_told_pooled_text_and_sizes():
    unet = unet_of(SDXL)
    torch.manual_seed(5)
    conditions = Conditions(torch.randn(1, 3, 40), torch.randn(1, 20))
    x, t = torch.randn(2, 4, 8, 16), torch.tensor([10, 900])
    geometry = torch.tensor([[300, 400, 5, 6], [64, 128, 0, 0]])
    sizes = torch.tensor([[300, 400, 5, 6, 64, 128], [64, 128, 0, 0, 64, 128]])  # target: 8 pixels per value
    with torch.no_grad():
        expected = unet(
            x,
            t,
            encoder_hidden_states=conditions.context.repeat(2, 1, 1),
            added_cond_kwargs={"text_embeds": conditions.pooled.repeat(2, 1), "time_ids": sizes},
        ).sample
        assert torch.equal(predict(unet, x, t, conditions, geometry), expected)
        as_made = predict(unet, x, t, conditions)
    torch.testing.assert_close(as_made[1], expected[1])
    assert (as_made[0] - expected[0]).abs().max() > 1e-3


def test_a_converted_unet_is_the_folded_file_run_by_diffusers(unet, empty, noised, tmp_path):
    constants = null_text_features(unet, "uniform_mean", empty)
    ldm = diffusers_to_ldm({**unet.state_dict(), **{f"{name}.f_null": value for name, value in constants.items()}})
    features = {key.removesuffix(".f_null"): ldm.pop(key) for key in list(ldm) if key.endswith(".f_null")}
    UNet2DConditionModel(**unet_config({key: tuple(value.shape) for key, value in ldm.items()})).save_config(tmp_path)
    folded = {f"model.diffusion_model.{key}": value for key, value in fold(ldm, features).items()}
    stock = UNet2DConditionModel.from_single_file(folded, config=str(tmp_path), local_files_only=True)
    to_null_text(unet, constants)
    for x, t in noised:
        with torch.no_grad():
            expected = predict(stock, x, t, Conditions(torch.randn(1, 77, 40)))
        torch.testing.assert_close(predict(unet, x, t, Conditions.without_text(40)), expected, rtol=1e-4, atol=1e-5)
