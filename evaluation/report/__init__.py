"""The page of an evaluation, made from its stored results alone."""

from .files import read_published, read_stages, write_report
from .page import Experiment, page_text

__all__ = ["Experiment", "page_text", "read_published", "read_stages", "write_report"]
