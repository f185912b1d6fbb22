"""Reports: figures, sentences and a page that opens offline."""

from trimtab.report.page import write_report
from trimtab.report.svg import write_svg

__all__ = ["write_report", "write_svg"]
