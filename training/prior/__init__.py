"""The Stable Diffusion model that a run starts from, read offline from single files and diffusers folders."""
