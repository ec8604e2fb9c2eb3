"""The page of an evaluation, made from its stored results alone."""

from .files import read_published, report, write_report
from .page import Experiment, page_text

__all__ = ["Experiment", "page_text", "read_published", "report", "write_report"]
