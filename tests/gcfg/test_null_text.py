"""The null-text features and module, against attention written out by hand in float64."""

import copy

import pytest
import torch
from comfyui_gcfg.gcfg.null_text import (
    ConstantCrossAttention,
    attention_means,
    cross_attention_blocks,
    is_null_text,
    null_text_blocks,
    replace_cross_attention,
    uniform_mean,
    uniform_means,
)
from comfyui_gcfg.testkit.checks import refusal
from torch import nn

C, D, HEADS, TOKENS = 8, 6, 2, 77


class Attention(nn.Module):
    """Cross-attention as LDM and diffusers define it; `container` is what they keep to_out in."""

    def __init__(self, container):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(C, C, bias=False), nn.Linear(D, C, bias=False)
        self.to_v = nn.Linear(D, C, bias=False)
        self.to_out = container([nn.Linear(C, C), nn.Dropout(0.0)])

    def forward(self, x, context, transformer_options=None):
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = (q @ k.transpose(-1, -2) * (C // HEADS) ** -0.5).softmax(dim=-1)
        out = (weights @ v).transpose(1, 2).flatten(-2)
        for layer in self.to_out:
            out = layer(out)
        return out


class Block(nn.Module):
    def __init__(self, container):
        super().__init__()
        self.norm1, self.norm2, self.attn2 = nn.LayerNorm(C), nn.LayerNorm(C), Attention(container)

    def forward(self, x, context):
        return self.attn2(self.norm2(x), context=context) + x


class UNet(nn.Module):
    def __init__(self, container):
        super().__init__()
        self.stem = nn.Linear(C, C)
        self.blocks = nn.ModuleList([Block(container), Block(container)])

    def forward(self, x, context):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, context)
        return x


@pytest.fixture(params=[lambda layers: nn.Sequential(*layers), nn.ModuleList], ids=["LDM", "diffusers"])
def unet(request):
    torch.manual_seed(0)
    return UNet(request.param).double().requires_grad_(False)


@pytest.fixture
def null_text():
    return torch.randn(1, TOKENS, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def image():
    return torch.randn(3, 16, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mean_of_values(attn2, null_text):
    """Eq. 5 as it is written: project every token, then take the mean, then W and its bias."""
    values = torch.stack([attn2.to_v.weight @ token for token in null_text[0]])
    return attn2.to_out[0].weight @ values.mean(dim=0) + attn2.to_out[0].bias


def test_blocks_are_found_by_their_cross_attention(unet):
    unet.blocks.append(nn.Linear(C, C))
    self_attending = Block(nn.ModuleList)
    del self_attending.attn2.to_q
    unet.blocks.append(self_attending)
    assert list(cross_attention_blocks(unet)) == ["blocks.0", "blocks.1"]
    assert cross_attention_blocks(unet)["blocks.1"] is unet.blocks[1]


def test_uniform_mean_is_eq_5(unet, null_text):
    for block in unet.blocks:
        feature = uniform_mean(null_text, block.attn2.to_v, block.attn2.to_out)
        assert feature.shape == (C,)
        torch.testing.assert_close(feature, mean_of_values(block.attn2, null_text), rtol=0, atol=1e-12)


def test_uniform_mean_of_a_repeated_prompt_is_that_of_one(unet, null_text):
    attn2 = unet.blocks[0].attn2
    one = uniform_mean(null_text, attn2.to_v, attn2.to_out)
    torch.testing.assert_close(
        uniform_mean(null_text.repeat(4, 1, 1), attn2.to_v, attn2.to_out), one, rtol=0, atol=1e-12
    )


def test_uniform_mean_refuses_a_flat_embedding(unet, null_text):
    attn2 = unet.blocks[0].attn2
    assert refusal(uniform_mean, null_text[0], attn2.to_v, attn2.to_out) == (
        "null_text has the shape (77, 6), expected (batch, tokens, width); "
        "encode the empty prompt with the model's own CLIP."
    )


def test_a_text_of_identical_tokens_gives_the_same_output(unet, null_text, image):
    """All values are equal, so whatever the attention, its output is W(V): the exact oracle."""
    same = null_text[:, :1].expand(1, TOKENS, D)
    expected = unet(image, same.expand(3, -1, -1))
    with null_text_blocks(unet, uniform_means(same, unet, cross_attention_blocks(unet))):
        got = unet(image, None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    other = unet(image, null_text.expand(3, -1, -1))
    assert (other - expected).abs().max() > 1e-2, "the oracle must tell texts apart"


def test_attention_means_are_the_mean_over_runs_batch_and_pixels(unet, null_text):
    latents = [
        torch.randn(b, 16, C, dtype=torch.float64, generator=torch.Generator().manual_seed(b)) for b in (1, 2, 2)
    ]
    runs = [lambda x=x: unet(x, null_text.expand(len(x), -1, -1)) for x in latents]
    means = attention_means(unet, cross_attention_blocks(unet), runs)
    for i, name in enumerate(["blocks.0", "blocks.1"]):
        outputs = []
        for x in latents:
            x = unet.stem(x)
            for block in unet.blocks[:i]:
                x = block(x, null_text.expand(len(x), -1, -1))
            block = unet.blocks[i]
            out = block.attn2(block.norm2(x), null_text.expand(len(x), -1, -1))
            outputs.append(out.mean(dim=1))
        torch.testing.assert_close(means[name], torch.cat(outputs).mean(dim=0).float())
    uniform = uniform_means(null_text, unet, means)
    assert all((uniform[name] - means[name]).abs().max() > 1e-3 for name in means), "the two modes must differ"
    assert not any(block.attn2._forward_hooks for block in unet.blocks)


def test_attention_means_take_their_hooks_off_after_an_error(unet):
    with pytest.raises(ZeroDivisionError):
        attention_means(unet, cross_attention_blocks(unet), [lambda: 1 / 0])
    assert not any(block.attn2._forward_hooks for block in unet.blocks)


def test_attention_means_do_not_invent_what_no_run_reached(unet):
    with pytest.raises(RuntimeError, match=r"blocks\.0"):
        attention_means(unet, cross_attention_blocks(unet), [])


def test_blocks_come_back_after_use_and_after_an_error(unet, image, null_text):
    before, weights = list(unet.modules()), copy.deepcopy(unet.state_dict())
    expected = unet(image, null_text.expand(3, -1, -1))
    features = uniform_means(null_text, unet, cross_attention_blocks(unet))
    with null_text_blocks(unet, features):
        assert is_null_text(unet)
        assert not cross_attention_blocks(unet)
    with pytest.raises(ZeroDivisionError), null_text_blocks(unet, features):
        _ = 1 / 0
    assert all(a is b for a, b in zip(before, unet.modules(), strict=True))
    assert all(torch.equal(weights[key], value) for key, value in unet.state_dict().items())
    assert not is_null_text(unet)
    assert torch.equal(unet(image, null_text.expand(3, -1, -1)), expected)


def test_a_failed_swap_restores_the_blocks_already_swapped(unet, null_text):
    features = uniform_means(null_text, unet, ["blocks.0"]) | {"blocks.9": torch.zeros(C)}
    with pytest.raises(AttributeError), null_text_blocks(unet, features):
        pass
    assert not is_null_text(unet)


def test_the_old_layers_are_not_run(unet, image, null_text):
    features = uniform_means(null_text, unet, cross_attention_blocks(unet))
    runs = []
    for block in unet.blocks:
        for layer in (block.norm2, *block.attn2.modules()):
            layer.register_forward_hook(lambda layer, args, output: runs.append(layer))
    unet(image, null_text.expand(3, -1, -1))
    assert len(runs) == 2 * 7  # norm2, attn2, q, k, v, linear, dropout: the counter counts
    runs.clear()
    with null_text_blocks(unet, features):
        unet(image, None)
    assert runs == []


def test_replacing_for_good_lets_the_weights_go(unet, image, null_text):
    features = uniform_means(null_text, unet, cross_attention_blocks(unet))
    with null_text_blocks(unet, features):
        expected = unet(image, None)
    replace_cross_attention(unet, features)
    assert torch.equal(unet(image, None), expected)
    assert [key for key in unet.state_dict() if "attn2" in key or "norm2" in key] == [
        "blocks.0.attn2.null_text_feature",
        "blocks.1.attn2.null_text_feature",
    ]
    assert unet.state_dict()["blocks.0.attn2.null_text_feature"].shape == (1, 1, C)


def test_the_constant_follows_its_input(unet):
    constant = ConstantCrossAttention(torch.arange(4.0))
    out = constant(torch.zeros(2, 5, 4, dtype=torch.bfloat16), context=torch.zeros(1), value=None)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), torch.arange(4.0).expand(2, 5, 4))
    assert not constant.null_text_feature.requires_grad


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v", "to_out"])
def test_asking_the_constant_for_a_projection_says_why_there_is_none(name):
    constant = ConstantCrossAttention(torch.zeros(4))
    assert not hasattr(constant, name)
    assert refusal(getattr, constant, name) == (
        f"Null-text model: a patch asked for attn2.{name}, expected by IPAdapter and other cross-attention "
        "replacements, but a null-text model has no cross-attention; apply that patch to another model."
    )
