"""The settings of Guidance Cache that are measured."""

from __future__ import annotations

from ..gcfg.reuse import Reuse

FULL = "full"
PRESET = "text2_concept3"  # of the workflow three-for-two

# name -> (what it is, (the text's rule, the concept's))
Rule = Reuse | None


def _both(rule: Rule) -> tuple[Rule, Rule]:
    return rule, rule


RULES: dict[str, tuple[str, tuple[Rule, Rule]]] = {
    FULL: ("full run", _both(None)),
    PRESET: ("text every 2, concept every 3 (the preset)", (Reuse(), Reuse(every=3))),
    "every2": ("every 2 (the node's defaults)", _both(Reuse())),
    "every2_hold": ("every 2, hold", _both(Reuse(linear=False))),
    "every3": ("every 3", _both(Reuse(every=3))),
    "every4": ("every 4", _both(Reuse(every=4))),
    "threshold_0.2": ("threshold 0.2", _both(Reuse(every=None, threshold=0.2))),
    "threshold_0.4": ("threshold 0.4", _both(Reuse(every=None, threshold=0.4))),
    "threshold_0.8": ("threshold 0.8", _both(Reuse(every=None, threshold=0.8))),
    "text_only": ("text every 2, concept always", (Reuse(), None)),
    "concept_only": ("concept every 2, text always", (None, Reuse())),
    "late": ("every 2 from 40 % on", _both(Reuse(start_percent=0.4))),
    "early": ("every 2 up to 60 %", _both(Reuse(end_percent=0.6))),
    "align_0.99": ("always, align 0.99", _both(Reuse(every=1, align=0.99))),
    "align_0.97": ("always, align 0.97", _both(Reuse(every=1, align=0.97))),
    "threshold_0.3_align_0.95": ("threshold 0.3, align 0.95", _both(Reuse(every=None, threshold=0.3, align=0.95))),
}
