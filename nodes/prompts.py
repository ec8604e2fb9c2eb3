"""Decoupled Prompt: one weighted guidance per line of text.

Condition decoupling: Cao et al. 2023, arXiv 2312.08195, section 4.4; negative weights: Appendix C.
"""

from __future__ import annotations

from typing import Any

from ..gcfg.errors import GuidanceError
from ..gcfg.prompt_lines import EXPECTED, read_prompt_lines
from ..gcfg.terms import GuidanceTerm
from .inputs import checked
from .runtime.versions import encode_prompt
from .sockets import TERMS

_LABEL = 32  # characters of a prompt that name its guidance


class GCFGDecoupledPrompt:
    """Node that makes one guidance term of each line."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "One guidance per line: weight | prompt, such as 7.5 | sunflower, or with an interval 5 @0-60% | in Van Gogh "
        "style. A negative weight is a negative prompt. Empty lines and lines that begin with # are left out."
    )
    RETURN_TYPES = (TERMS,)
    RETURN_NAMES = ("terms",)
    OUTPUT_TOOLTIPS = ("A term for each line, after those of the terms input.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "Encodes the prompts, as in CLIP Text Encode."}),
                "text": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "7.5 | sunflower\n5 @0-60% | in Van Gogh style\n-2 | blurry",
                        "tooltip": "weight | prompt, or weight @start-end% | prompt. (word:1.2) and embedding:name "
                        "work as elsewhere.",
                    },
                ),
            },
            "optional": {
                "model": (
                    "MODEL",
                    {"tooltip": "The model that predicts these guidances. Not connected: the sampler's own model."},
                ),
                "terms": (TERMS, {"tooltip": "Further terms to pass on together with these."}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, text: str | None) -> bool | str:
        """Refuse a text with a bad line before anything runs; one that another node makes is not known yet."""
        if not isinstance(text, str):
            return True
        lines, problems = read_prompt_lines(text)
        if problems:
            return "; ".join(map(str, problems))
        return True if lines else f"no line, {EXPECTED}."

    @checked("Decoupled Prompt")
    def make(
        self, clip: Any, text: str, model: Any = None, terms: tuple[GuidanceTerm, ...] = ()
    ) -> tuple[tuple[GuidanceTerm, ...]]:
        """Append a term for each line to `terms`."""
        valid = self.VALIDATE_INPUTS(text)
        if valid is not True:
            raise GuidanceError(f"Decoupled Prompt: text, {valid}")
        lines, _ = read_prompt_lines(text)
        made = [
            GuidanceTerm(
                line.weight,
                line.start_percent,
                line.end_percent,
                model,
                encode_prompt(clip, line.text),
                label=_label(line.text),
            )
            for line in lines
        ]
        return ((*terms, *made),)


def _label(text: str) -> str:
    return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"


NODES = [("GCFGDecoupledPrompt", "Decoupled Prompt", GCFGDecoupledPrompt)]
