"""A UNet and a ControlNet of the small world's form, with random weights that use every path."""

import pytest
import torch
from comfyui_gcfg.reproduction.prior import new_unet
from diffusers import ControlNetModel


@pytest.fixture(scope="session")
def unet():
    torch.manual_seed(3)
    return new_unet().eval()


@pytest.fixture(scope="session")
def controlnet(unet):
    torch.manual_seed(4)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256)).eval()
    for name, parameter in control.named_parameters():  # its last layers start at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
            assert name
    return control
