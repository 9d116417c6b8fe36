"""Draw the results of the link bench: latencies against bandwidth, and the stages of one request."""

from collections.abc import Mapping, Sequence
from typing import Any

from spectrumkv.bench.report.plot import save

MARKERS = "sod^"
STAGE_COLOURS = {"prefill": "tab:blue", "wire": "tab:orange", "handoff": "tab:red", "decode": "tab:green"}
BAR_HEIGHT = 0.38
DOTS_PER_INCH = 110

Rows = Sequence[Mapping[str, Any]]


def draw_bandwidths(rows: Rows, path: str, title: str) -> None:
    """Draw TTFT and hand-off against bandwidth, a curve for each setting, and the hand-off's floor as a dotted line.

    Args:
        rows: the rows.
        path: file of the plot.
        title: title of the plot.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("ttft_ms", "handoff_ms"), ("time to first token, s", "hand-off, s"), strict=True
    ):
        for number, setting in enumerate(dict.fromkeys(row["setting"] for row in rows)):
            points = [row for row in rows if row["setting"] == setting]
            rates = [row["rate_mbps"] for row in points]
            (line,) = axes.plot(
                rates, [row[key] / 1000 for row in points], marker=MARKERS[number % len(MARKERS)], label=setting
            )
            if key == "handoff_ms":
                floors = [row["handoff_floor_ms"] / 1000 for row in points]
                axes.plot(rates, floors, ls=":", color=line.get_color(), lw=1)
                axes.set_yscale("log")
        if key == "ttft_ms":
            # Set after the last curve, because a limit stops the axis from growing.
            axes.set_ylim(bottom=0)
        axes.set_xscale("log")
        axes.set_xlabel("link, Mb/s")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3, which="both")
    axes.legend(title="dotted: floor with overlap", fontsize="small", title_fontsize="small")
    figure.suptitle(title)
    save(figure, path, DOTS_PER_INCH)


def draw_timeline(rows: Rows, path: str, title: str) -> None:
    """Draw the stages of one request of each row, one above the other.

    Args:
        rows: the rows of one bandwidth.
        path: file of the plot.
        title: title of the plot.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for stage, (start, end) in row["timeline"].items():
            # Computing is drawn above, the wire and the hand-off below.
            offset = -BAR_HEIGHT / 2 if stage in ("prefill", "decode") else BAR_HEIGHT / 2
            label = stage if place == 0 else None
            axes.barh(
                place + offset,
                end - start,
                BAR_HEIGHT * _share(stage),
                start,
                color=STAGE_COLOURS[stage],
                label=label,
            )
    axes.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds after the request was sent")
    axes.grid(visible=True, axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(STAGE_COLOURS), fontsize="small")
    axes.set_title(title)
    save(figure, path, DOTS_PER_INCH)


def _share(stage: str) -> float:
    """Return the share of a bar's height: the hand-off is narrower, on top of the wire that it waits for."""
    return 0.4 if stage == "handoff" else 1.0
