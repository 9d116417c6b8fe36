"""Run `spectrumkv-bench plot`, and draw the rows of `quality` and `niah` without a display."""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectrumkv.bench.report.quality_runs import read_comparable
from spectrumkv.client.cli.output import check_writable
from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError

FORMATS = (".png", ".svg", ".pdf")
MARKERS = "osD^vP*Xdh<>p"
# A logarithmic axis has no zero, so identical distributions are drawn at this KL.
LEAST_KL = 1e-8
# Within ± this many per cent, the axis of Δ perplexity is linear.
LINEAR_DELTA_PCT = 0.1
# Ticks of the budget axis.
BUDGET_TICKS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)

Rows = Sequence[Mapping[str, Any]]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "plot",
        help="draw several runs of quality, such as the services' and the peers', in one plot",
        description="Draw the rows of several results of `quality` on the same model, text and windows.",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="result file of quality")
    parser.add_argument("--plot", required=True, metavar="FILE", help="file of the plot (.png, .svg or .pdf)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Draw the plot.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: a result cannot be read, the runs are not comparable, or the plot cannot be drawn.
    """
    check_plot("--plot", arguments.plot)
    results = read_comparable(arguments.results)
    rows = [row for result in results for row in result["rows"]]
    draw_quality(rows, arguments.plot, results[0]["meta"]["model"]["name"])
    return 0


def check_plot(flag: str, path: str) -> None:
    """Refuse a plot that could not be drawn or written.

    Args:
        flag: the flag that names the file, for the error message.
        path: the file.

    Raises:
        InvalidArgumentError: the file cannot be written, or its format is unknown.
        FailedPreconditionError: matplotlib is not installed.
    """
    check_writable(flag, path)
    if Path(path).suffix not in FORMATS:
        raise InvalidArgumentError(f"{flag} {path}; allowed: a file that ends in one of {', '.join(FORMATS)}")
    _figure_class()


def draw_quality(rows: Rows, path: str, title: str) -> None:
    """Draw KL and Δ perplexity against counted bytes, a curve for each method, with confidence intervals.

    Args:
        rows: rows of `quality`.
        path: file of the plot.
        title: title of the plot.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    figure = _figure_class()(figsize=(12, 9), layout="constrained")
    divergence, delta = figure.subplots(2, 1, sharex=True)
    palette = colormaps["tab20"]
    for number, (label, curve) in enumerate(_curves(rows).items()):
        style = {
            "color": palette(number % palette.N),
            "marker": MARKERS[number % len(MARKERS)],
            "capsize": 2,
            "lw": 1,
        }
        points = sorted(curve, key=lambda row: float(row["budget_counted"]))
        budgets = [row["budget_counted"] for row in points]
        kl = [max(row["kl"], LEAST_KL) for row in points]
        divergence.errorbar(budgets, kl, _errors(points, "kl"), label=label, **style)
        change = [row["ppl_delta_pct"] for row in points]
        delta.errorbar(budgets, change, _errors(points, "ppl_delta_pct"), **style)
    divergence.set_yscale("log")
    divergence.set_ylabel("KL to FP16 KV, nats per token")
    delta.set_yscale("symlog", linthresh=LINEAR_DELTA_PCT)
    delta.axhline(0, color="gray", lw=0.5)
    delta.set_ylabel("Δ perplexity, %")
    delta.set_xscale("log")
    delta.set_xticks(BUDGET_TICKS, [f"{tick:g}" for tick in BUDGET_TICKS])
    delta.xaxis.set_minor_formatter(NullFormatter())
    delta.set_xlabel("counted bytes ÷ FP16 KV bytes")
    for axes in (divergence, delta):
        axes.grid(visible=True, alpha=0.3)
        # Markers at the edge of a logarithmic axis are cut off otherwise.
        axes.margins(y=0.1)
    figure.align_ylabels()
    windows = rows[0]["windows"]
    divergence.set_title(f"{title}: {f'{windows} windows, 95 % intervals' if windows > 1 else '1 window'}")
    figure.legend(loc="outside right upper", fontsize="small")
    save(figure, path)


def draw_niah(rows: Rows, path: str, title: str) -> None:
    """Draw a heat map of depth × counted budget for each method, with a column for exact KV.

    Args:
        rows: rows of `niah`.
        path: file of the plot.
        title: title of the plot.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    curves = _curves(rows)
    width = min(4, len(curves))
    height = -(-len(curves) // width)
    figure = _figure_class()(figsize=(1 + 3.2 * width, 1 + 3 * height), layout="constrained")
    panels = figure.subplots(height, width, squeeze=False).flatten()
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes, (label, curve) in zip(panels, curves.items(), strict=False):
        points = sorted(curve, key=lambda row: float(row["budget_counted"]))
        columns = [*(_share(row, "found") for row in points), _share(points[0], "found_fp16")]
        shares = [list(line) for line in zip(*columns, strict=True)]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        names = [f"{row['budget_counted']:.2f}" for row in points] + ["FP16"]
        axes.set_xticks(range(len(names)), names, rotation=60, fontsize="small")
        depths = [depth["depth"] for depth in points[0]["by_depth"]]
        every = max(1, len(depths) // 6)
        axes.set_yticks(range(0, len(depths), every), [f"{depth:.0%}" for depth in depths[::every]], fontsize="small")
        axes.set_title(label, fontsize="medium")
    figure.supxlabel("counted bytes ÷ FP16 KV bytes")
    figure.supylabel("needle's depth")
    figure.suptitle(title)
    figure.colorbar(image, ax=list(panels), label="share found", shrink=0.6)
    save(figure, path)


def _share(row: Mapping[str, Any], key: str) -> list[float]:
    return [depth[key] / depth["total"] for depth in row["by_depth"]]


def _curves(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of each method by its label, which has only the parts that differ between methods."""
    told_apart = [key for key in ("codec", "scorer", "scope") if len({row[key] for row in rows if row[key]}) > 1]
    curves = defaultdict(list)
    for row in rows:
        extras = [row[key] for key in told_apart if row[key]]
        curves[row["policy"] + (f" ({', '.join(extras)})" if extras else "")].append(row)
    return dict(curves)


def _errors(points: Rows, key: str) -> list[list[float]] | None:
    """Return the lengths of the error bars, down and up; None if a row has no interval."""
    if any(row[f"{key}_ci"] is None for row in points):
        return None
    down = [max(0.0, row[key] - row[f"{key}_ci"][0]) for row in points]
    return [down, [max(0.0, row[f"{key}_ci"][1] - row[key]) for row in points]]


def _figure_class() -> Any:
    """Return matplotlib's `Figure`, which needs no display and picks its backend by the file it is saved to.

    Raises:
        FailedPreconditionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FailedPreconditionError(
            "--plot needs matplotlib, which is not installed; pip install 'spectrumkv[bench]'"
        ) from error
    return Figure


def save(figure: Any, path: str, dpi: int = 120) -> None:
    """Write a figure of matplotlib.

    Args:
        figure: the figure.
        path: the file.
        dpi: dots per inch.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise InvalidArgumentError(f"cannot write {path}: {error.strerror}; name another file") from error
