"""The images of a run and their cached latents."""
