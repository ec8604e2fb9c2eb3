"""The small world's autoencoder: a TAESD (https://github.com/madebyollin/taesd) of 32 channels, trained from scratch.

TAESD is the one autoencoder format that is small by design and that every ComfyUI reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = 32
_SPREAD = 0.5  # of the latents that the UNet sees, see `to_taesd`
_SD1_FACTOR = 0.18215  # between an SD1.x VAE's latents and what the UNet sees
_LATENT_NOISE = 0.3  # the decoder forgives that much of the UNet's error


def train_autoencoder(
    pictures: Tensor,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    tick: Callable[[], object] = int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Train on pictures and return the weights in TAESD's keys.

        loss = |r - x| + (r - x)^2 + 0.02 (mean(z)^2 + (var(z) - 1)^2),   r = decode(z + noise)

    Args:
        pictures: uint8, (N, 3, H, W).
        steps: of AdamW; the learning rate falls linearly to a fiftieth.
        batch_size: pictures of one step.
        learning_rate: after 50 steps of warm-up.
        tick: called after each step.
        device: to train on.
    """
    torch.manual_seed(0)
    vae = new_autoencoder().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), learning_rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 50) * max(0.02, 1 - step / steps)
        chosen = pictures[torch.randint(len(pictures), (batch_size,))].to(device)
        x = signed(chosen).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            z = vae.encoder(x).float()
            r = vae.decoder(z + _LATENT_NOISE * torch.randn_like(z)).float()
        spread = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
        loss = functional.l1_loss(r, x) + functional.mse_loss(r, x) + 0.02 * spread
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        tick()
    return to_taesd(vae.cpu())


@torch.no_grad()
def encode(vae: Mapping[str, Tensor], pictures: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the latents of uint8 pictures, (N, 4, H / 8, W / 8), as the UNet sees them."""
    network = from_taesd(vae).to(device)
    return _SPREAD * torch.cat([network.encoder(signed(some.to(device))).cpu() for some in torch.split(pictures, 256)])


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures of one size as uint8, (N, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def signed(pictures: Tensor) -> Tensor:
    """Return uint8 pictures as -1 .. 1."""
    return pictures.float() / 127.5 - 1


def new_autoencoder(decoder_channels: int = CHANNELS) -> AutoencoderTiny:
    """Return an untrained TAESD without its blocks at full resolution: half the cost, and small pictures need none."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(CHANNELS,) * 4,
        decoder_block_out_channels=(decoder_channels,) * 4,
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
    network = new_autoencoder(decoder_channels=len(vae[_key("decoder", 1, "weight")])).eval()
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
