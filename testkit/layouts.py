"""Tensor names and shapes of the real checkpoint layouts, with as few blocks as detection allows, or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]

CHANNELS = 320  # model_channels: SD1.x, SD2.x and SDXL are all recognised by it
NARROW = 64  # the least that has their heads: a twenty-fifth of the weights, where a loader takes any number
HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256)  # and then the ControlNet's own


@dataclass(frozen=True)
class Family:
    """What ComfyUI's model detection reads off a UNet; everything else about its size is free.

    Attributes:
        context_dim: width of the text embedding, which tells SD1.x (768), SD2.x (1024) and SDXL (2048) apart.
        linear: whether a transformer's proj_in/proj_out are matrices (SD2.x, SDXL) or 1x1 convolutions (SD1.x).
        adm: width of the pooled vector, 0 for none.
        depths: transformer depth at each resolution; [0, 2, 5] is the shortest list that is still an SDXL (KOALA).
        widths: channels at each resolution in units of `model_channels`; () for 1 everywhere.
        blocks: residual blocks at each resolution on the way down; one more on the way up.
        middle: transformer depth between the two ways.
        up: transformer depth at each resolution on the way up; () for at most 1.
        model_channels: channels of the first resolution.
    """

    context_dim: int
    linear: bool
    adm: int
    depths: tuple[int, ...]
    widths: tuple[int, ...] = ()
    blocks: int = 1
    middle: int = 1
    up: tuple[int, ...] = ()
    model_channels: int = CHANNELS

    @property
    def time_channels(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.model_channels

    def channels(self, level: int) -> int:
        """Return the channels at a resolution."""
        return self.model_channels * (self.widths[level] if self.widths else 1)


FAMILIES = {
    "sd15": Family(context_dim=768, linear=False, adm=0, depths=(1,)),
    # The published SD1.5: 859,520,964 parameters.
    "sd15-full": Family(context_dim=768, linear=False, adm=0, depths=(1, 1, 1, 0), widths=(1, 2, 4, 4), blocks=2),
    "sd21": Family(context_dim=1024, linear=True, adm=0, depths=(1,)),
    "sdxl": Family(context_dim=2048, linear=True, adm=2816, depths=(0, 2, 5)),
    # The published SDXL base: 2,567,463,684 parameters.
    "sdxl-full": Family(
        context_dim=2048,
        linear=True,
        adm=2816,
        depths=(0, 2, 10),
        widths=(1, 2, 4),
        blocks=2,
        middle=10,
        up=(0, 2, 10),
    ),
}


def _affine(name: str, *weight: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _res_block(c_in: int, c_out: int, family: Family) -> Shapes:
    shapes = {
        **_affine("in_layers.0", c_in),
        **_affine("in_layers.2", c_out, c_in, 3, 3),
        **_affine("emb_layers.1", c_out, family.time_channels),
        **_affine("out_layers.0", c_out),
        **_affine("out_layers.3", c_out, c_out, 3, 3),
    }
    return shapes if c_in == c_out else {**shapes, **_affine("skip_connection", c_out, c_in, 1, 1)}


def _attention(c: int, context: int) -> Shapes:
    return {
        "to_q.weight": (c, c),
        "to_k.weight": (c, context),
        "to_v.weight": (c, context),
        **_affine("to_out.0", c, c),
    }


def _transformer(c: int, family: Family, depth: int) -> Shapes:
    proj = (c, c) if family.linear else (c, c, 1, 1)
    shapes = {**_affine("norm", c), **_affine("proj_in", *proj), **_affine("proj_out", *proj)}
    block = {
        **_under("attn1", _attention(c, c)),
        **_under("attn2", _attention(c, family.context_dim)),
        **_affine("ff.net.0.proj", 8 * c, c),
        **_affine("ff.net.2", c, 4 * c),
        **{k: v for i in (1, 2, 3) for k, v in _affine(f"norm{i}", c).items()},
    }
    for i in range(depth):
        shapes |= _under(f"transformer_blocks.{i}", block)
    return shapes


def _stage(c_in: int, c_out: int, family: Family, depth: int) -> Shapes:
    shapes = _under("0", _res_block(c_in, c_out, family))
    return {**shapes, **_under("1", _transformer(c_out, family, depth))} if depth else shapes


def _middle(c: int, family: Family) -> Shapes:
    return {
        **_under("middle_block.0", _res_block(c, c, family)),
        **_under("middle_block.1", _transformer(c, family, family.middle)),
        **_under("middle_block.2", _res_block(c, c, family)),
    }


def _encoder(family: Family) -> tuple[Shapes, list[int]]:
    """Return the shapes of the down path (with time and label embedding) and the channels each input block gives."""
    c, t = family.model_channels, family.time_channels
    shapes = {**_affine("time_embed.0", t, c), **_affine("time_embed.2", t, t)}
    if family.adm:
        shapes |= {**_affine("label_emb.0.0", t, family.adm), **_affine("label_emb.0.2", t, t)}
    shapes |= _affine("input_blocks.0.0", c, 4, 3, 3)
    skips = [c]
    for level, depth in enumerate(family.depths):
        if level:
            shapes |= _affine(f"input_blocks.{len(skips)}.0.op", c, c, 3, 3)
            skips.append(c)
        for _ in range(family.blocks):
            shapes |= _under(f"input_blocks.{len(skips)}", _stage(c, family.channels(level), family, depth))
            c = family.channels(level)
            skips.append(c)
    return shapes, skips


def unet(family: Family) -> Shapes:
    """Bare LDM names (`input_blocks.0.0.weight`, ...) of a UNet."""
    shapes, skips = _encoder(family)
    c = skips[-1]
    shapes |= _middle(c, family)
    index = 0
    for level in reversed(range(len(family.depths))):
        depth = family.up[level] if family.up else min(family.depths[level], 1)
        for block in range(family.blocks + 1):
            shapes |= _under(f"output_blocks.{index}", _stage(c + skips.pop(), family.channels(level), family, depth))
            c = family.channels(level)
            if block == family.blocks and level:
                slot = 2 if depth else 1
                shapes |= _affine(f"output_blocks.{index}.{slot}.conv", c, c, 3, 3)
            index += 1
    return {**shapes, **_affine("out.0", c), **_affine("out.2", 4, c, 3, 3)}


def controlnet(family: Family) -> Shapes:
    """LDM names of a ControlNet for that UNet, `control_model.` prefix included."""
    shapes, skips = _encoder(family)
    shapes |= _middle(skips[-1], family)
    for i, (c_in, c_out) in enumerate(pairwise((*HINT_CHANNELS, family.model_channels))):
        shapes |= _affine(f"input_hint_block.{2 * i}", c_out, c_in, 3, 3)
    for i, c in enumerate(skips):
        shapes |= _affine(f"zero_convs.{i}.0", c, c, 1, 1)
    c = skips[-1]
    return _under("control_model", {**shapes, **_affine("middle_block_out.0", c, c, 1, 1)})


def vae() -> Shapes:
    """Names of a TAESD, the one VAE format that is small by design (2.4 M parameters)."""
    shapes: Shapes = {"vae_scale": (), "vae_shift": ()}

    def block(name: str) -> Shapes:
        return {k: v for i in (0, 2, 4) for k, v in _affine(f"{name}.conv.{i}", 64, 64, 3, 3).items()}

    for side, first, last, blocks, resize in (
        ("encoder", (0, 3), (14, 4), (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), (2, 6, 10)),
        ("decoder", (1, 4), (19, 3), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), (7, 12, 17)),
    ):
        name = f"taesd_{side}"
        shapes |= _affine(f"{name}.{first[0]}", 64, first[1], 3, 3)
        shapes |= _affine(f"{name}.{last[0]}", last[1], 64, 3, 3)
        shapes |= {f"{name}.{i}.weight": (64, 64, 3, 3) for i in resize}
        for i in blocks:
            shapes |= block(f"{name}.{i}")
    return shapes


def clip_l() -> Shapes:
    """Names of the CLIP-L text encoder of SD1.x (Hugging Face layout); its 12 layers are fixed in every loader."""
    c = 768
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, c),
        "text_model.embeddings.position_embedding.weight": (77, c),
        **_affine("text_model.final_layer_norm", c),
    }
    layer = {
        **{k: v for p in "qkv" for k, v in _affine(f"self_attn.{p}_proj", c, c).items()},
        **_affine("self_attn.out_proj", c, c),
        **_affine("layer_norm1", c),
        **_affine("layer_norm2", c),
        **_affine("mlp.fc1", 4 * c, c),
        **_affine("mlp.fc2", c, 4 * c),
    }
    for i in range(12):
        shapes |= _under(f"text_model.encoder.layers.{i}", layer)
    return shapes


def clip_g() -> Shapes:
    """Names of SDXL's second text encoder (OpenCLIP layout, 32 layers of 1280)."""
    c = 1280
    shapes: Shapes = {
        "token_embedding.weight": (49408, c),
        "positional_embedding": (77, c),
        "text_projection": (c, c),
        **_affine("ln_final", c),
    }
    layer = {
        "attn.in_proj_weight": (3 * c, c),
        "attn.in_proj_bias": (3 * c,),
        **_affine("attn.out_proj", c, c),
        **_affine("ln_1", c),
        **_affine("ln_2", c),
        **_affine("mlp.c_fc", 4 * c, c),
        **_affine("mlp.c_proj", c, 4 * c),
    }
    for i in range(32):
        shapes |= _under(f"transformer.resblocks.{i}", layer)
    return shapes
