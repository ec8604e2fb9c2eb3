"""`python -m comfyui_gcfg.training` is `gcfg`: for torchrun and accelerate launch, which start modules."""

from .cli import main

main()
