"""Figures of the pack beside its peers, measured in one run; part of the checkout, not of the wheel."""
