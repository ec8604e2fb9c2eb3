"""Text encoding as ComfyUI's own node does it."""

from __future__ import annotations

from typing import Any


def encode_prompt(clip: Any, text: str) -> Any:
    """A CONDITIONING of the text, as CLIP Text Encode makes it."""
    tokens = clip.tokenize(text)
    if hasattr(clip, "encode_from_tokens_scheduled"):  # carries the hooks of newer versions
        return clip.encode_from_tokens_scheduled(tokens)
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return [[cond, {"pooled_output": pooled}]]
