"""Everything that touches ComfyUI's internals; no other part of the pack imports `comfy`."""
