"""Draw time lines of hand-offs: a line for each layer, a colour for each step that it passes."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from spectrumkv.bench.device.timeline.handoff import MOMENTS
from spectrumkv.bench.report.plot import save

DOTS_PER_INCH = 110
BAR_HEIGHT = 0.8
# Of the step that ends with each moment.
STEPS = {
    "coding": ("waits for coding", "lightgray"),
    "coded": ("is coded", "tab:blue"),
    "handed_over": ("waits for gRPC", "gray"),
    "arrived": ("is on its way", "tab:orange"),
    "accepted": ("waits for decoding", "khaki"),
    "joined": ("is decoded", "tab:green"),
}

Rows = Sequence[Mapping[str, Any]]


def draw_timelines(rows: Rows, path: str, title: str) -> None:
    """Draw a panel for each row, side by side the contenders, one above the other without and with MPS.

    Args:
        rows: of the stage `timeline`.
        path: file of the plot.
        title: title of the plot.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    modes = list(dict.fromkeys(row["mps"] for row in rows))
    figure = Figure(figsize=(1 + 4 * len(contenders), 1.5 + 3.5 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(contenders), squeeze=False, sharex=True, sharey=True)
    for row in rows:
        axes = panels[modes.index(row["mps"])][contenders.index(row["contender"])]
        places = [layer["layer"] for layer in row["layers"]]
        for before, after in pairwise(MOMENTS):
            label, colour = STEPS[after]
            starts = [1e3 * layer[before] for layer in row["layers"]]
            widths = [1e3 * (layer[after] - layer[before]) for layer in row["layers"]]
            axes.barh(places, widths, BAR_HEIGHT, starts, color=colour, label=label)
        axes.axvline(1e3 * max(layer["computed"] for layer in row["layers"]), color="black", ls=":", lw=1)
        axes.set_title(f"{row['contender']}{' with MPS' if row['mps'] else ''}: hand-off {row['handoff_ms']:.0f} ms")
        axes.grid(visible=True, axis="x", alpha=0.3)
    # The axes are shared, so that they are set once.
    panels[0][0].invert_yaxis()
    panels[0][0].yaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0][0].set_xlim(left=0)
    for axes in panels[-1]:
        axes.set_xlabel("ms after the prompt was given to the model")
    for line in panels:
        line[0].set_ylabel("layer")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STEPS), fontsize="small")
    figure.suptitle(f"{title}; dotted: the last layer was computed")
    save(figure, path, DOTS_PER_INCH)
