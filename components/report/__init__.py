"""What people look at after a run: plots, tables and pages."""

from components.report.comparison import comparison, plot_comparison
from components.report.curves import plot_run
from components.report.report_page import report_page
from components.report.rollouts_page import rollouts_page, rollouts_table
from components.report.summary import before_after

__all__ = [
    "before_after",
    "comparison",
    "plot_comparison",
    "plot_run",
    "report_page",
    "rollouts_page",
    "rollouts_table",
]
