"""Draws the second token against bandwidth."""

from collections.abc import Mapping, Sequence
from typing import Any

from spectrumkv.bench.report.plot import save

MARKERS = "sod^v"
DOTS_PER_INCH = 110


def draw(rows: Sequence[Mapping[str, Any]], path: str, title: str) -> None:
    """Draw the time to the second token and the bytes on the link against bandwidth, a curve for each setting.

    Args:
        rows: see `measure.rate_rows`.
        path: file of the plot.
        title: title of the plot.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = (("second_token_ms", 1e3, "time to second token, s"), ("link_bytes", 1e6, "bytes on the link, MB"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, setting in enumerate(dict.fromkeys(row["setting"] for row in rows)):
            points = [row for row in rows if row["setting"] == setting]
            rates, values = [row["rate_mbps"] for row in points], [row[key] / unit for row in points]
            axes.plot(rates, values, marker=MARKERS[number % len(MARKERS)], label=setting)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("link, Mb/s")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.suptitle(title)
    save(figure, path, DOTS_PER_INCH)
