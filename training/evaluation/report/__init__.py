"""The page of an evaluation, made from its stored results alone."""

from .page import Experiment, page_text, read_published, read_stages, write_report

__all__ = ["Experiment", "page_text", "read_published", "read_stages", "write_report"]
