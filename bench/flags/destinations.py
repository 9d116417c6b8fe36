"""Where a bench writes its results: looked at before anything is measured, since a run can take hours."""

import argparse

from spectrumkv.bench.report import plots
from spectrumkv.client.cli.output_file import check_writable

PLOT_FLAGS = ("plot", "timeline")


def check_destinations(arguments: argparse.Namespace) -> None:
    """Refuse results that could not be written, before hours are spent on them. Nothing is made or changed.

    Args:
        arguments: of any bench; of `--json`, `--plot` and `--timeline` those are looked at that it has.

    Raises:
        InvalidArgumentError: a name is empty, a plot's format is not known, a folder does not exist, or a file
            cannot be written.
        FailedPreconditionError: a plot is asked for and matplotlib is not installed.
    """
    check_writable("--json", getattr(arguments, "json", None))
    for name in PLOT_FLAGS:
        plot: str | None = getattr(arguments, name, None)
        if plot is not None:
            check_writable(f"--{name}", plot)
            plots.check_format(f"--{name}", plot)
