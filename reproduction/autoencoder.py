"""The world's autoencoder: a TAESD (https://github.com/madebyollin/taesd) that learned every look from scratch.

TAESD is the one autoencoder format that is small by design and that every ComfyUI reads. Nothing that is held out in 3D
is among what it learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional

from .pictures import Drawing, Drawings, compose, draw_placement, shown_solid
from .vendors import THREE_D

CHANNELS = 32  # of the encoder
DECODER_CHANNELS = 64  # as TAESD
BATCH = 16
CROP = 64  # pixels of a side: a part of a picture teaches as much as the whole, at less than half of the cost
LATENT_NOISE = 0.1  # that the decoder forgives
_SOLID_SHARE = 0.35  # of the pictures: shading is what the flat looks do not teach
_SPREAD = 0.5  # of the latents that the UNet sees, see `to_taesd`
_SD1_FACTOR = 0.18215  # between an SD1.x VAE's latents and what the UNet sees


def autoencoder_loss(drawings: Drawings) -> Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]:
    """Return the loss of one step.

        |r - x| + (r - x)^2 + |dr - dx| + 0.02 (mean(z)^2 + (var(z) - 1)^2),   r = decode(z + noise)

    d: differences of neighbouring pixels, which keep edges sharp.
    """
    others, solid = drawings.choose(lambda row: row.look != THREE_D), drawings.choose(shown_solid)

    def loss(vae: nn.Module, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        encode, decode = vae.get_submodule("encoder"), vae.get_submodule("decoder")
        x = signed(draw_crops(drawings, others, solid, rng)).contiguous(memory_format=torch.channels_last)
        x = x.to(next(vae.parameters()).device)
        z: Tensor = encode(x).float()
        r: Tensor = decode(z + LATENT_NOISE * torch.randn(z.shape, generator=noise).to(z)).float()
        spread = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
        return functional.l1_loss(r, x) + functional.mse_loss(r, x) + edge_loss(r, x) + 0.02 * spread

    return loss


def decoder_loss(drawings: Drawings) -> Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]:
    """Return the loss of one step of the decoder alone: as `autoencoder_loss`, around an encoder that stays."""
    others, solid = drawings.choose(lambda row: row.look != THREE_D), drawings.choose(shown_solid)

    def loss(vae: nn.Module, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        x = signed(draw_crops(drawings, others, solid, rng)).contiguous(memory_format=torch.channels_last)
        x = x.to(next(vae.parameters()).device)
        with torch.no_grad():
            z = vae.get_submodule("encoder")(x).float()
        r = vae.get_submodule("decoder")(z + LATENT_NOISE * torch.randn(z.shape, generator=noise).to(z)).float()
        return functional.l1_loss(r, x) + functional.mse_loss(r, x) + edge_loss(r, x)

    return loss


def edge_loss(r: Tensor, x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels' differences."""
    return sum((functional.l1_loss(r.diff(dim=side), x.diff(dim=side)) for side in (2, 3)), torch.zeros(()).to(x))


def draw_crops(
    drawings: Drawings, others: list[Drawing], solid: list[Drawing], rng: np.random.Generator, count: int = BATCH
) -> Tensor:
    """Draw parts of pictures, uint8, (count, 3, 64, 64)."""
    rows = []
    for _ in range(count):
        kind = solid if rng.random() < _SOLID_SHARE else others
        rows.append(kind[int(rng.integers(len(kind)))])
    pictures = compose(drawings, rows, [draw_placement(row, rng) for row in rows])
    corners = rng.integers(0, pictures.shape[-1] - CROP + 1, (count, 2))
    return torch.stack(
        [picture[:, y : y + CROP, x : x + CROP] for picture, (y, x) in zip(pictures, corners.tolist(), strict=True)]
    )


@torch.no_grad()
def encode(vae: Mapping[str, Tensor], pictures: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the latents of uint8 pictures, (N, 4, H / 8, W / 8), as the UNet sees them."""
    network = from_taesd(vae).to(device)
    return _SPREAD * torch.cat([network.encoder(signed(some.to(device))).cpu() for some in torch.split(pictures, 256)])


def signed(pictures: Tensor) -> Tensor:
    """Return uint8 pictures as -1 .. 1."""
    return pictures.float() / 127.5 - 1


def new_autoencoder() -> AutoencoderTiny:
    """Return an untrained TAESD without its blocks at full resolution: half the cost, and small pictures need none."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(CHANNELS,) * 4,
        decoder_block_out_channels=(DECODER_CHANNELS,) * 4,
        num_encoder_blocks=(1, 1, 2, 3),
        num_decoder_blocks=(3, 2, 1, 1),
    )
    vae.encoder.layers[1] = nn.ReLU()  # what a residual block of zeros is
    vae.decoder.layers[-2] = nn.ReLU()
    return vae


# Where each layer of ours is in the full TAESD; blocks that are missing in between are zeros.
_ENCODER = {0: 0, 2: 2, 3: 3, 4: 6, 5: 7, 6: 8, 7: 10, 8: 11, 9: 12, 10: 13, 11: 14}
_DECODER = {0: 1, 2: 3, 3: 4, 4: 5, 6: 7, 7: 8, 8: 9, 10: 12, 11: 13, 13: 17, 15: 19}


def to_taesd(vae: AutoencoderTiny) -> dict[str, Tensor]:
    """Return the weights in TAESD's keys, with the scale that gives the UNet's latents a spread of 0.5.

    A plain background is the same number at each of the 64 places. At a spread of 1 Stable Diffusion's noise hardly
    hides it at the last timestep, so that the starting noise, not the prompt, would choose the background's colour.
    """
    full = AutoencoderTiny(
        encoder_block_out_channels=vae.config["encoder_block_out_channels"],
        decoder_block_out_channels=vae.config["decoder_block_out_channels"],
    )
    out = {
        _key(side, _full_index(side, index), rest): torch.zeros_like(tensor)
        for side, index, rest, tensor in _walk(full)
    }
    for side, index, rest, tensor in _walk(vae):
        place = (_ENCODER if side == "encoder" else _DECODER)[index]
        out[_key(side, place, rest)] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return out | {"vae_scale": torch.tensor(_SD1_FACTOR / _SPREAD), "vae_shift": torch.tensor(0.0)}


def from_taesd(vae: Mapping[str, Tensor]) -> AutoencoderTiny:
    """Return the network of weights in TAESD's keys."""
    network = new_autoencoder().eval()
    state = {}
    for side, index, rest, _ in _walk(network):
        place = (_ENCODER if side == "encoder" else _DECODER)[index]
        state[f"{side}.layers.{index}.{rest}"] = vae[_key(side, place, rest)].float()
    network.load_state_dict(state)
    return network


def _walk(vae: AutoencoderTiny) -> list[tuple[str, int, str, Tensor]]:
    found = []
    for name, tensor in vae.state_dict().items():
        side, _, index, rest = name.split(".", 3)
        found.append((side, int(index), rest, tensor))
    return found


def _full_index(side: str, index: int) -> int:
    return index + (side == "decoder")  # TAESD's decoder counts the clamp in front


def _key(side: str, index: int, rest: str) -> str:
    return f"taesd_{side}.{index}.{rest}"
