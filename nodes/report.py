"""Guidance Report: what each term did, as a picture and as text, for people without a browser."""

from __future__ import annotations

from typing import Any

from ..gcfg.diagnostics import GuidanceReport
from ..gcfg.errors import GuidanceError
from .figures import report_figure
from .inputs import checked
from .sockets import REPORT


class GCFGGuidanceReport:
    """Node that draws and writes the report of a run."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "What each term did at every step of a run: how strongly it pulled, relative to the unconditional prediction, "
        "and which terms pulled against each other. As a plot, as JSON and as CSV."
    )
    RETURN_TYPES = ("IMAGE", "STRING", "STRING")
    RETURN_NAMES = ("plot", "json", "csv")
    OUTPUT_TOOLTIPS = ("The pulls and cosines over the steps.", "The readings as JSON.", "The readings as CSV.")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        return {
            "required": {"report": (REPORT, {"tooltip": "The report output of a GCFG sampler or guider."})},
            "optional": {
                "latent": (
                    "LATENT",
                    {
                        "tooltip": "For a GCFG Guider or GCFG Model: the sampler's output, so that the report is made "
                        "after the sampling. Not needed with the GCFG KSamplers."
                    },
                )
            },
        }

    @checked("Guidance Report")
    def make(self, report: GuidanceReport, latent: Any = None) -> tuple[Any, str, str]:
        """Draw and write the report."""
        if not report.readings:
            raise GuidanceError(
                "Guidance Report: report is empty, expected the readings of a run; after a GCFG Guider or GCFG Model "
                "connect latent to the output of the sampler, and where ComfyUI shows the result of an earlier run "
                "change the seed."
            )
        return report_figure(report), report.as_json(), report.as_csv()


NODES = [("GCFGGuidanceReport", "Guidance Report", GCFGGuidanceReport)]
