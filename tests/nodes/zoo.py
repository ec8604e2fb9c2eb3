"""Small models with random weights, one or more of every architecture that ComfyUI runs.

Each is ComfyUI's own class, with a configuration that keeps its structure (a block of every kind, all inputs) in a few
hundred thousand parameters, and a conditioning and a latent of the form that its own nodes make.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """How to build one.

    Attributes:
        architecture: what it stands for.
        classname: in comfy.supported_models.
        config: of its diffusion model.
        text: (tokens, width) of its conditioning.
        shapes: (C, *spatial) of the streams of its latent.
        pooled: shape of the pooled conditioning, where it has one.
        options: further entries of its conditioning, made from a seed.
        batches: whether it evaluates several latents in one call.
        extra_weights: for its conditioners, which are not part of the diffusion model.
    """

    architecture: str
    classname: str
    config: dict[str, Any]
    text: tuple[int, int]
    shapes: Sequence[tuple[int, ...]]
    pooled: tuple[int, ...] | None = None
    options: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    batches: bool = True
    extra_weights: Callable[[], dict[str, torch.Tensor]] = dict

    def conditioning(self, seed: int, width: int | None = None) -> Any:
        """A CONDITIONING of random text, of its own width unless told."""
        tokens, own = self.text
        options = {name: make(seed) for name, make in self.options.items()}
        if self.pooled is not None:
            options["pooled_output"] = normal(self.pooled, seed + 100)
        return [[normal((1, tokens, width or own), seed), options]]

    def latent(self, batch: int = 1, seed: int | None = None) -> dict[str, Any]:
        """An empty latent, or one of a random image."""
        parts = [torch.zeros(batch, *shape) for shape in self.shapes]
        if seed is not None:
            parts = [normal(part.shape, seed + number) for number, part in enumerate(parts)]
        return {"samples": parts[0] if len(parts) == 1 else nested(parts)}

    def model(self, seed: int) -> Any:
        """A patcher of the model with weights of this seed; a LookupError says that this ComfyUI has none."""
        import comfy.model_patcher
        import comfy.supported_models

        kind = getattr(comfy.supported_models, self.classname, None)
        if kind is None:
            raise LookupError(f"this ComfyUI has no {self.classname}")
        config = kind(copy.deepcopy(self.config))
        config.unet_config.update(copy.deepcopy(self.config))  # over what the class would put in its place
        config.set_inference_dtype(torch.float32, None)
        try:
            model = config.get_model(self.extra_weights(), "", device=None)
        except (TypeError, KeyError, AttributeError) as error:  # options that came later than the class
            raise LookupError(f"this ComfyUI builds {self.classname} otherwise ({error})") from error
        fill(model.diffusion_model, seed)
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        return patcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def nested(parts: Sequence[torch.Tensor]) -> Any:
    import comfy.nested_tensor

    return comfy.nested_tensor.NestedTensor(parts)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations of order one; frequencies of position embeddings rise evenly."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        last = name.split(".")[-1]
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "freq" in last:
            tensor.data.copy_(torch.linspace(0.1, 1.0, tensor.numel()).reshape(tensor.shape))
        elif not isinstance(tensor, torch.nn.Parameter) and last != "pos_embed":
            continue  # other buffers are what the class made them
        elif tensor.ndim >= 2:
            tensor.data.copy_(noise / math.sqrt(max(tensor[0].numel(), 1)))
        elif last in ("weight", "scale", "gamma"):
            tensor.data.copy_(1.0 + 0.1 * noise)
        else:
            tensor.data.copy_(0.05 * noise)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[int], torch.Tensor]:
    return lambda seed: torch.ones(shape, dtype=dtype)


def drawn(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda seed: normal(shape, seed + 200)


def number_conditioners(names: Sequence[str], largest: int, **options: Any) -> dict[str, torch.Tensor]:
    """Weights of Stable Audio's embedders of seconds."""
    import comfy.ldm.audio.embedders

    module = comfy.ldm.audio.embedders.NumberConditioner(768, min_val=0, max_val=largest, **options)
    fill(module, 3)
    return {
        f"conditioner.conditioners.{name}.{key}": value.clone()
        for name in names
        for key, value in module.state_dict().items()
    }


_UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 20,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 48,
    "cap_feat_dim": 20,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 16,
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "in_dim": 16,
    "out_dim": 16,
    "num_heads": 2,
    "ffn_dim": 64,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
    "freq_dim": 32,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "text_dim": 20,
    "text_len": 16,
}
_HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 24,
    "axes_dim": [8, 8, 8],
    "context_in_dim": 20,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "theta": 256,
    "qkv_bias": True,
    "byt5": False,
    "meanflow": False,
    "meanflow_sum": False,
    "guidance_embed": True,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 48,
    "num_blocks": 2,
    "num_heads": 2,
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "crossattn_emb_channels": 20,
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
}
_COSMOS_PREDICT2 = {
    **_COSMOS,
    "image_model": "cosmos_predict2",
    "pos_emb_learnable": True,
    "min_fps": 1,
    "max_fps": 30,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
_PIXART = {
    "num_heads": 2,
    "patch_size": 2,
    "hidden_size": 64,
    "in_channels": 4,
    "depth": 2,
    "model_max_length": 16,
    "input_size": 16,
    "pe_interpolation": 1,
    "caption_channels": 20,
}
_STABLE_AUDIO = {
    "audio_model": "dit1.0",
    "global_cond_dim": 1536,
    "project_cond_tokens": True,
    "cond_token_dim": 768,
    "embed_dim": 64,
    "num_heads": 2,
    "io_channels": 64,
    "input_concat_dim": 0,
    "depth": 2,
    "timestep_features_type": "learned",
}

FAMILIES = {
    "sd15": Family(
        "UNet",
        "SD15",
        {**_UNET, "context_dim": 768, "use_linear_in_transformer": False, "adm_in_channels": None},
        (7, 768),
        [(4, 8, 8)],
    ),
    "sdxl": Family(
        "UNet",
        "SDXL",
        {
            **_UNET,
            "model_channels": 64,
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
        },
        (7, 2048),
        [(4, 8, 8)],
        (1, 1280),
    ),
    "cascade_c": Family(
        "UNet",
        "Stable_Cascade_C",
        {"stable_cascade_stage": "c", "c_cond": 64, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]]},
        (7, 1280),
        [(16, 6, 6)],
        (1, 1, 1280),
    ),
    "sd3": Family(
        "MMDiT",
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 24, "out_features": 128},
            },
            "num_patches": 64,
            "pos_embed_max_size": 8,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [],
        },
        (7, 24),
        [(16, 8, 8)],
        (1, 32),
    ),
    "qwen_image": Family(
        "MMDiT",
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 20,
            "axes_dims_rope": (4, 6, 6),
        },
        (7, 20),
        [(16, 1, 8, 8)],
    ),
    "auraflow": Family(
        "MMDiT",
        "AuraFlow",
        {
            "max_seq": 64,
            "cond_seq_dim": 20,
            "n_double_layers": 1,
            "n_layers": 2,
            "dim": 64,
            "n_heads": 2,
            "global_conddim": 64,
        },
        (7, 20),
        [(4, 8, 8)],
    ),
    "hidream": Family(
        "MMDiT",
        "HiDream",
        {
            "image_model": "hidream",
            "attention_head_dim": 16,
            "axes_dims_rope": [8, 4, 4],
            "caption_channels": [20, 20],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "out_channels": 16,
            "llama_layers": [0, 1, 1],
            "num_attention_heads": 2,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "num_layers": 1,
            "num_single_layers": 1,
            "patch_size": 2,
            "text_emb_dim": 24,
        },
        (7, 20),
        [(16, 8, 8)],
        (1, 24),
        {"conditioning_llama3": drawn(1, 2, 5, 20)},
    ),
    "flux": Family("Flux", "Flux", _FLUX, (7, 20), [(16, 8, 8)], (1, 24)),
    "flux_schnell": Family("Flux", "FluxSchnell", {**_FLUX, "guidance_embed": False}, (7, 20), [(16, 8, 8)], (1, 24)),
    "flux2": Family(
        "Flux",
        "Flux2",
        {
            **_FLUX,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "vec_in_dim": None,
            "mlp_ratio": 3.0,
            "axes_dim": [4, 4, 4, 4],
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "txt_ids_dims": [3],
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
        },
        (7, 20),
        [(128, 4, 4)],
        (1, 24),  # which it does not read, but 0.8.0 asks for
    ),
    "chroma": Family(
        "Flux",
        "Chroma",
        {
            **{key: value for key, value in _FLUX.items() if key != "guidance_embed"},
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "vec_in_dim": None,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 19,
            "depth_single_blocks": 38,
            "in_dim": 64,
            "out_dim": 32,
            "hidden_dim": 32,
            "n_layers": 2,
        },
        (7, 20),
        [(16, 8, 8)],
        (1, 24),
    ),
    "hunyuan_image21": Family(
        "Flux",
        "HunyuanImage21",
        {
            **_HUNYUAN_VIDEO,
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": [1, 1],
            "axes_dim": [12, 12],
            "vec_in_dim": None,
            "guidance_embed": False,
        },
        (7, 20),
        [(64, 4, 4)],
        (1, 24),
    ),
    "lumina2": Family("single stream", "Lumina2", _LUMINA, (7, 20), [(16, 8, 8)]),
    "zimage": Family(
        "single stream",
        "ZImage",
        {
            **_LUMINA,
            "dim": 256,
            "n_heads": 4,
            "n_kv_heads": 4,
            "axes_dims": [16, 24, 24],
            "rope_theta": 256.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 4,
        },
        (7, 20),
        [(16, 8, 8)],
    ),
    "omnigen2": Family(
        "single stream",
        "Omnigen2",
        {
            "image_model": "omnigen2",
            "axes_dim_rope": [8, 8, 8],
            "axes_lens": [64, 64, 64],
            "ffn_dim_multiplier": None,
            "hidden_size": 48,
            "in_channels": 16,
            "out_channels": None,
            "multiple_of": 16,
            "norm_eps": 1e-5,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "text_feat_dim": 20,
            "timestep_scale": 1000.0,
        },
        (7, 20),
        [(16, 8, 8)],
        None,
        {"attention_mask": ones(1, 7, dtype=torch.long)},
    ),
    "ideogram4": Family(
        "single stream",
        "Ideogram4",
        {
            "image_model": "ideogram4",
            "in_channels": 128,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 20,
            "mrope_section": [6, 5, 5],
        },
        (7, 20),
        [(128, 4, 4)],
    ),
    "krea2": Family(
        "single stream",
        "Krea2",
        {
            "image_model": "krea2",
            "features": 64,
            "channels": 16,
            "patch": 2,
            "layers": 2,
            "heads": 2,
            "kvheads": 1,
            "txtlayers": 2,
            "txtdim": 20,
        },
        (7, 40),
        [(16, 8, 8)],
    ),
    "pixart_alpha": Family(
        "cross-attention DiT",
        "PixArtAlpha",
        {**_PIXART, "image_model": "pixart_alpha", "hidden_size": 48, "micro_condition": True},
        (7, 20),
        [(4, 80, 80)],
        None,
        {"width": lambda seed: 640, "height": lambda seed: 640},
    ),
    "pixart_sigma": Family(
        "cross-attention DiT",
        "PixArtSigma",
        {**_PIXART, "image_model": "pixart_sigma", "micro_condition": False},
        (7, 20),
        [(4, 80, 80)],
    ),
    "cosmos_predict2": Family("cross-attention DiT", "CosmosT2IPredict2", _COSMOS_PREDICT2, (7, 20), [(16, 1, 4, 4)]),
    "anima": Family(
        "cross-attention DiT",
        "Anima",
        {**_COSMOS_PREDICT2, "image_model": "anima", "crossattn_emb_channels": 1024},
        (7, 1024),
        [(16, 1, 4, 4)],
    ),
    "hunyuan_dit": Family(
        "cross-attention DiT",
        "HunyuanDiT",
        {"image_model": "hydit", "depth": 2, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2.0},
        (77, 1024),
        [(4, 8, 8)],
        None,
        {
            "attention_mask": ones(1, 77),
            "conditioning_mt5xl": drawn(1, 256, 2048),
            "attention_mask_mt5xl": ones(1, 256),
        },
    ),
    "wan21": Family("video", "WAN21_T2V", _WAN, (7, 20), [(16, 3, 4, 4)]),
    "wan21_i2v": Family("video", "WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36}, (7, 20), [(16, 3, 4, 4)]),
    "wan21_vace": Family(
        "video",
        "WAN21_Vace",
        {**_WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96},
        (7, 20),
        [(16, 3, 4, 4)],
    ),
    "wan22": Family("video", "WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48}, (7, 20), [(48, 3, 4, 4)]),
    "hunyuan_video": Family("video", "HunyuanVideo", _HUNYUAN_VIDEO, (7, 20), [(16, 3, 4, 4)], (1, 24)),
    "hunyuan_video15": Family(
        "video",
        "HunyuanVideo15",
        {
            **_HUNYUAN_VIDEO,
            "in_channels": 65,
            "out_channels": 32,
            "patch_size": [1, 1, 1],
            "vec_in_dim": None,
            "guidance_embed": False,
            "use_cond_type_embedding": True,
            "vision_in_dim": 20,
        },
        (7, 20),
        [(32, 3, 4, 4)],
        (1, 24),
    ),
    "cosmos": Family(
        "video",
        "CosmosT2V",
        {
            **_COSMOS,
            "image_model": "cosmos",
            "pos_emb_learnable": False,
            "block_config": "FA-CA-MLP",
            "block_x_format": "THWBD",
            "affline_emb_norm": True,
            "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable",
        },
        (7, 20),
        [(16, 3, 4, 4)],
    ),
    "kandinsky5": Family(
        "video",
        "Kandinsky5",
        {
            "image_model": "kandinsky5",
            "model_dim": 48,
            "axes_dims": (8, 8, 8),
            "time_dim": 32,
            "ff_dim": 64,
            "visual_embed_dim": 132,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
        },
        (7, 3584),
        [(16, 3, 4, 4)],
        (1, 768),
    ),
    "ltxv": Family(
        "video",
        "LTXV",
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": 48,
            "attention_head_dim": 24,
            "num_attention_heads": 2,
            "caption_channels": 20,
            "num_layers": 2,
        },
        (7, 20),
        [(128, 3, 4, 4)],
        None,
        {"attention_mask": ones(1, 7, dtype=torch.long)},
    ),
    "stable_audio": Family(
        "audio",
        "StableAudio",
        _STABLE_AUDIO,
        (7, 768),
        [(64, 20)],
        extra_weights=lambda: number_conditioners(["seconds_start", "seconds_total"], 512),
    ),
    "stable_audio3": Family(
        "audio",
        "StableAudio3",
        {
            **_STABLE_AUDIO,
            "global_cond_dim": 768,
            "io_channels": 256,
            "timestep_features_type": "expo",
            "global_cond_shared_embed": True,
            "global_cond_type": "adaLN",
            "local_add_cond_dim": 257,
            "norm_type": "rms_norm",
            "attn_kwargs": {"qk_norm": "rms"},
            "num_memory_tokens": 2,
        },
        (7, 768),
        [(256, 20)],
        extra_weights=lambda: number_conditioners(["seconds_total"], 384, fourier_features_type="expo"),
    ),
    "ace": Family(
        "audio",
        "ACEStep",
        {
            "audio_model": "ace",
            "attention_head_dim": 16,
            "in_channels": 8,
            "out_channels": 8,
            "inner_dim": 32,
            "max_height": 16,
            "max_position": 512,
            "max_width": 512,
            "mlp_ratio": 2.0,
            "num_attention_heads": 2,
            "num_layers": 2,
            "patch_size": [16, 1],
            "rope_theta": 10000.0,
            "speaker_embedding_dim": 512,
            "text_embedding_dim": 20,
            "ssl_encoder_depths": [8, 8],
            "ssl_latent_dims": [8, 8],
            "ssl_names": ["mert", "m-hubert"],
            "lyric_encoder_vocab_size": 50,
            "lyric_hidden_size": 1024,
        },
        (7, 20),
        [(8, 16, 12)],
        None,
        {"conditioning_lyrics": lambda seed: torch.arange(5)[None] + seed % 10},
    ),
    "ltxav": Family(
        "nested",
        "LTXAV",
        {
            "image_model": "ltxav",
            "in_channels": 128,
            "audio_in_channels": 128,
            "cross_attention_dim": 48,
            "audio_cross_attention_dim": 32,
            "attention_head_dim": 24,
            "audio_attention_head_dim": 16,
            "num_attention_heads": 2,
            "audio_num_attention_heads": 2,
            "caption_channels": 20,
            "num_layers": 2,
            "connector_attention_head_dim": 10,
            "connector_num_attention_heads": 2,
            "connector_num_layers": 1,
            "rope_type": "split",
        },
        (8, 40),  # of both streams, as 0.8.0 takes it and later versions too
        [(128, 2, 2, 2), (8, 9, 16)],
    ),
    "minimax_h3": Family(
        "nested",
        "MiniMaxH3",
        {
            "image_model": "minimax_h3",
            "hidden_size": 64,
            "num_layers": 2,
            "token_refiner_num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 96,
            "ffn_hidden_size": 64,
            "latents_dim": 24,
            "audio_latents_dim": 32,
            "text_dim": 20,
            "timestep_input_dim": 32,
            "time_embed_hidden_size": 32,
            "time_embed_dim": 24,
            "rope_inv_freq_len": 16,
        },
        (8, 20),
        [(24, 2, 4, 4), (32, 2, 9)],
        batches=False,
    ),
    "hunyuan3d": Family(
        "3-D",
        "Hunyuan3Dv2",
        {
            "image_model": "hunyuan3d2",
            "in_channels": 64,
            "context_in_dim": 20,
            "hidden_size": 64,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "depth_single_blocks": 1,
            "qkv_bias": True,
            "guidance_embed": False,
        },
        (7, 20),
        [(64, 12)],
    ),
}
