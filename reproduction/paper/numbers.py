"""The paper's own numbers (Cao et al. 2023, Tables 1 and 2), by the name that a method has in a config."""

from __future__ import annotations

from dataclasses import dataclass

from ...evaluation.report import words

OURS = "ours"
TEXTUAL_INVERSION = "textual_inversion"
DREAMBOOTH = "dreambooth"


@dataclass(frozen=True)
class PaperRow:
    """A method's row in both tables.

    Attributes:
        title: the method's name.
        parameters: that were trained, as the paper writes them.
        fid_face: on FFHQ.
        fid_animal: on AFHQv2.
        alignment: of text-guided images.
        discrepancy: of the edges of spatially guided images.
    """

    title: str
    parameters: str
    fid_face: float
    fid_animal: float
    alignment: float
    discrepancy: float

    @property
    def parameter_count(self) -> float:
        """For ranks and circles."""
        number = self.parameters.lstrip("<")
        return float(number[:-1]) * {"K": 1e3, "M": 1e6}[number[-1]]


PAPER = {
    TEXTUAL_INVERSION: PaperRow("Textual Inversion", "<1K", 70.62, 44.75, 0.97, 0.22),
    DREAMBOOTH: PaperRow("DreamBooth", "859M", 12.37, 23.92, 0.24, 0.22),
    "custom_diffusion": PaperRow("Custom Diffusion", "44M", 40.98, 49.98, 0.74, 0.20),
    "oft": PaperRow("OFT", "23M", 27.50, 38.74, 0.77, 0.21),
    OURS: PaperRow("Ours", "859M", 6.57, 18.82, 0.89, 0.20),
}
# The columns beside one's own, {heading: {method: cell}}.
TABLE_1 = {
    "*paper:* parameters": {name: row.parameters for name, row in PAPER.items()},
    "*paper:* FID, face": {name: f"{row.fid_face:.2f}" for name, row in PAPER.items()},
    "*paper:* FID, animal": {name: f"{row.fid_animal:.2f}" for name, row in PAPER.items()},
}
TABLE_2 = {
    "*paper:* alignment ↑": {name: f"{row.alignment:.2f}" for name, row in PAPER.items()},
    "*paper:* edge difference ↓": {name: f"{row.discrepancy:.2f}" for name, row in PAPER.items()},
}
# The last row of Table 1.
STYLEGAN = ("StyleGAN3-T (a dedicated generator)", *(words.ABSENT,) * 3, "3.16", "4.04")
