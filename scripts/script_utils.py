"""Gone soon: `compare.py` and `comparison_report.py` still import these from here."""

from support.command_line import UsageError
from support.runs import PLOT_NAME, last_checkpoint

__all__ = ["PLOT_NAME", "UsageError", "last_checkpoint"]
