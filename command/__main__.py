"""`python -m comfyui_gcfg.command` is `gcfg`: for torchrun and accelerate launch, which start modules."""

from .main import main

main()
