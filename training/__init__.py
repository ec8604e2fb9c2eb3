"""The offline trainer and its command; imports gcfg, never the nodes or ComfyUI."""
