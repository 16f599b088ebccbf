"""What people look at after a run: plots, tables and pages."""

from components.report.comparison import comparison, plot_comparison
from components.report.curves import plot_run, plot_runs
from components.report.report_page import report_page, report_plots
from components.report.rollouts_page import rollouts_page, rollouts_table
from components.report.summary import before_after

__all__ = [
    "before_after",
    "comparison",
    "plot_comparison",
    "plot_run",
    "plot_runs",
    "report_page",
    "report_plots",
    "rollouts_page",
    "rollouts_table",
]
