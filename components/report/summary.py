"""The table at the end of a run: validation before and after, with the paired standard error of each change."""

from pathlib import Path

from rich.table import Table

from components.evaluation import load_validations
from components.report.labels import title

_ROWS = ("cross_entropy", "feature_matching_loss", "feature_matching_loss_whitened", "alignment", "diversity")


def before_after(run_dir: Path) -> Table:
    """First against last validation of a run.

    Raises:
        ValueError: fewer than two validations.
    """
    validations = load_validations(run_dir)
    if len(validations) < 2:
        raise ValueError(
            f"'{run_dir}' holds {len(validations)} validations; a comparison needs one before and one after"
        )
    (first, before), *_, (last, after) = validations.items()
    held_out = after["cross_entropy"]
    groups = "" if held_out.groups is None else f", {len(set(held_out.groups))} groups"
    table = Table(title=f"Validation, {len(held_out.values)} rows of held-out text{groups}")
    table.add_column("metric")
    for heading in (f"step {first}", f"step {last}", "change ± paired standard error", "in standard errors"):
        table.add_column(heading, justify="right")
    for name in _ROWS:
        if name in before and name in after:
            change = after[name].change_since(before[name])
            mean, error = change.mean(), change.standard_error()
            table.add_row(
                title(name),
                f"{before[name].mean():.4f}",
                f"{after[name].mean():.4f}",
                f"{mean:+.4f} ± {error:.4f}",
                f"{mean / error:+.1f}" if error > 0 else "-",
            )
    return table
