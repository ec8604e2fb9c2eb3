"""GCFG for ComfyUI: guidance from several diffusion models at once."""

import sys

NODE_CLASS_MAPPINGS = {}
NODE_DISPLAY_NAME_MAPPINGS = {}
WEB_DIRECTORY = "./web"

# ComfyUI has imported its `folder_paths` before it loads any pack; the trainer and the tests, which import this
# package under its installed name, have not, and must not load ComfyUI with it.
if "folder_paths" in sys.modules:
    from .nodes import (
        concept,
        guidance,
        guidance_cache,
        model,
        prompts,
        regions,
        relation,
        report,
        sampling,
        weight_sweep,
    )
    from .nodes.runtime import routes

    for topic in (concept, guidance, prompts, regions, relation, guidance_cache, sampling, model, weight_sweep, report):
        for node_id, display_name, node in topic.NODES:
            NODE_CLASS_MAPPINGS[node_id] = node
            NODE_DISPLAY_NAME_MAPPINGS[node_id] = display_name
    routes.register()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
