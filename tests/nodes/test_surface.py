"""The node surface that shared workflow files depend on: ids, inputs in order, outputs. Frozen once released."""

import pytest

TERMS = [f"term_{number}" for number in range(1, 9)]
SURFACE = {
    "GCFGLoadConceptUNet": ("Load Concept UNet", ["unet_name", "weight_dtype"], [], ("MODEL",)),
    "GCFGNullTextPatch": ("Null-Text Patch", ["model", "null_text", "mode"], [], ("MODEL",)),
    "GCFGGuidanceTerm": (
        "Guidance Term",
        ["weight", "start_percent", "end_percent"],
        [
            *("model", "conditioning", "mask", "terms", "label", "curve", "end_weight", "points", "stream_weights"),
            *("relative_model", "relative_conditioning"),
        ],
        ("GCFG_TERMS",),
    ),
    "GCFGDecoupledPrompt": ("Decoupled Prompt", ["clip", "text"], ["model", "terms"], ("GCFG_TERMS",)),
    "GCFGRegionTerms": ("Region Terms", ["regions", "overlap"], ["background"], ("GCFG_TERMS",)),
    "GCFGGuidanceRelation": ("Guidance Relation", ["terms", "relation", "against", "amount"], [], ("GCFG_TERMS",)),
    "GCFGGuidanceCache": (
        "Guidance Cache",
        ["terms", "mode", "every", "threshold", "extrapolation", "start_percent", "end_percent", "align"],
        [],
        ("GCFG_TERMS",),
    ),
    "GCFGGuider": ("GCFG Guider", ["model", "unconditional"], TERMS, ("GUIDER", "GCFG_REPORT")),
    "GCFGKSampler": (
        "GCFG KSampler",
        ["model", "seed", "steps", "sampler_name", "scheduler", "unconditional", "latent_image", "denoise"],
        TERMS,
        ("LATENT", "GCFG_REPORT"),
    ),
    "GCFGKSamplerAdvanced": (
        "GCFG KSampler (Advanced)",
        [
            *("model", "add_noise", "noise_seed", "steps", "sampler_name", "scheduler", "unconditional"),
            *("latent_image", "start_at_step", "end_at_step", "return_with_leftover_noise"),
        ],
        TERMS,
        ("LATENT", "GCFG_REPORT"),
    ),
    "GCFGModel": ("GCFG Model", ["model"], TERMS, ("MODEL", "GCFG_REPORT")),
    "GCFGWeightSweep": (
        "Weight Sweep",
        [
            *("model", "seed", "steps", "sampler_name", "scheduler", "unconditional", "latent_image", "denoise", "vae"),
            *("label_1", "weights_1", "label_2", "weights_2"),
        ],
        TERMS,
        ("IMAGE", "IMAGE", "LATENT"),
    ),
    "GCFGGuidanceReport": ("Guidance Report", ["report"], ["latent"], ("IMAGE", "STRING", "STRING")),
}


@pytest.fixture
def nodes(comfy):
    from comfyui_gcfg.nodes import (
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

    topics = (guidance_cache, concept, guidance, model, prompts, regions, relation, report, sampling, weight_sweep)
    return {node_id: (name, node) for topic in topics for node_id, name, node in topic.NODES}


def test_no_node_more_or_less(nodes):
    assert set(nodes) == set(SURFACE)


@pytest.mark.parametrize("node_id", SURFACE)
def test_surface(nodes, node_id):
    name, node = nodes[node_id]
    inputs = node.INPUT_TYPES()
    found = (name, list(inputs["required"]), list(inputs.get("optional", {})), node.RETURN_TYPES)
    assert found == SURFACE[node_id]
    assert callable(getattr(node, node.FUNCTION))


@pytest.mark.parametrize("node_id", SURFACE)
def test_every_input_and_output_is_explained(nodes, node_id):
    _, node = nodes[node_id]
    assert node.CATEGORY == "GCFG"
    assert len(node.DESCRIPTION) > 40
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
    kinds = node.INPUT_TYPES()
    for inputs in (kinds["required"], kinds.get("optional", {})):
        for name, (_, options) in inputs.items():
            assert len(options["tooltip"]) > 8, name
