"""The settings of Guidance Cache that are measured."""

from __future__ import annotations

from ..gcfg.guidance_cache import CacheRule

FULL = "full"
PRESET = "text2_concept3"  # of the workflow three-for-two

# name -> (what it is, (the text's rule, the concept's))
Rule = CacheRule | None


def _both(rule: Rule) -> tuple[Rule, Rule]:
    return rule, rule


RULES: dict[str, tuple[str, tuple[Rule, Rule]]] = {
    FULL: ("full run", _both(None)),
    PRESET: ("text every 2, concept every 3 (the preset)", (CacheRule(), CacheRule(every=3))),
    "every2": ("every 2 (the node's defaults)", _both(CacheRule())),
    "every2_hold": ("every 2, hold", _both(CacheRule(linear=False))),
    "every3": ("every 3", _both(CacheRule(every=3))),
    "every4": ("every 4", _both(CacheRule(every=4))),
    "threshold_0.2": ("threshold 0.2", _both(CacheRule(every=None, threshold=0.2))),
    "threshold_0.4": ("threshold 0.4", _both(CacheRule(every=None, threshold=0.4))),
    "threshold_0.8": ("threshold 0.8", _both(CacheRule(every=None, threshold=0.8))),
    "text_only": ("text every 2, concept always", (CacheRule(), None)),
    "concept_only": ("concept every 2, text always", (None, CacheRule())),
    "late": ("every 2 from 40 % on", _both(CacheRule(start_percent=0.4))),
    "early": ("every 2 up to 60 %", _both(CacheRule(end_percent=0.6))),
    "align_0.99": ("always, align 0.99", _both(CacheRule(every=1, align=0.99))),
    "align_0.97": ("always, align 0.97", _both(CacheRule(every=1, align=0.97))),
    "threshold_0.3_align_0.95": ("threshold 0.3, align 0.95", _both(CacheRule(every=None, threshold=0.3, align=0.95))),
}
