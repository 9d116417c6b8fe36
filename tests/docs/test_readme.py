"""The README's figures are those of the committed runs, and what it shows as output was printed."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.docs.documents import README, RESULTS

TEXT = README.read_text()
# Without line breaks, for sentences.
PROSE = " ".join(TEXT.split())
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")
NEEDLE_BUDGETS = {0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1}

Row = dict[str, Any]


def rows(file: str) -> list[Row]:
    """Return the rows of a committed run."""
    found: list[Row] = json.loads((RESULTS / file).read_text())["rows"]
    return found


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its own heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def shown_as(figure: str, value: float) -> bool:
    """Return whether a value, rounded as the figure is, is the figure."""
    if "e" in figure:
        digits = len(figure.split("e")[0].partition(".")[2])
        return f"{value:.{digits}e}" == figure.lstrip("+")
    digits = len(figure.partition(".")[2])
    return float(f"{value:.{digits}f}") == float(figure)


def check(figures: str, values: list[float], where: str) -> None:
    """Say which figure is not the run's."""
    found = NUMBER.findall(figures)
    assert len(found) == len(values), f"{where}: {figures!r} should have {len(values)} figures"
    wrong = [
        f"{figure} ({value})" for figure, value in zip(found, values, strict=True) if not shown_as(figure, value)
    ]
    assert not wrong, f"{where}: {', '.join(wrong)}"


@pytest.mark.parametrize("cells", table("How much quality a budget keeps"), ids=lambda cells: " ".join(cells[:2]))
def test_every_figure_about_quality_is_in_the_results(cells: list[str]) -> None:
    policy, budget, perplexity, kl, same = cells
    named = re.fullmatch(r"([\w-]+)(?: \((\w+)\))?", policy)
    assert named is not None
    # The first row is the newest.
    measured = rows("quality-wikitext-codecs.json") + rows("quality-wikitext.json") + rows("quality-kvpress.json")
    row = next(
        row
        for row in measured
        if row["policy"] == named[1]
        and named[2] in (None, row.get("codec"))
        and shown_as(budget, row["budget_counted"])
    )
    check(perplexity, [row["ppl_delta_pct"], *row["ppl_delta_pct_ci"]], f"{policy} {budget}, perplexity")
    check(kl, [row["kl"]], f"{policy} {budget}, KL")
    check(same, [100 * row["top1_agreement"]], f"{policy} {budget}, same top token")


Values = Callable[[str], list[float]]
"""Takes the values of one measurement from a file of results."""


def serve(key: str) -> Values:
    """Take what was measured with `native` and with the default policy at 0.3."""

    def values(file: str) -> list[float]:
        measured = {row["policy"]: row[key] for row in rows(file)}
        return [measured["native"], measured["spectral"]]

    return values


def handoff(rate: float, *settings: str) -> Values:
    """Take seconds of the hand-off over a shaped link of so many Mb/s."""

    def values(file: str) -> list[float]:
        measured = {(row["rate_mbps"], row["setting"]): row["handoff_ms"] / 1000 for row in rows(file)}
        return [measured[rate, setting] for setting in settings]

    return values


def only(key: str, **wanted: object) -> Values:
    """Take one value of the one row that has these values."""

    def values(file: str) -> list[float]:
        [row] = [row for row in rows(file) if wanted.items() <= row.items()]
        return [row[key]]

    return values


SPEED: dict[str, Values] = {
    "first token of 1,024-token prompts ÷ one process": serve("median_ttft_ms_ratio"),
    "hand-off ÷ gap between tokens": serve("handoff_itl_ratio"),
    "tokens a second of eight streams ÷ one process": serve("decode_throughput_ratio"),
    "first token of eight short prompts at once ÷ one process": serve("median_ttft_ms_ratio"),
    "tokens a second of one stream ÷ one process": serve("decode_throughput_ratio"),
    "p99 gap while another prompt's KV arrives ÷ undisturbed": serve("p99_itl_ratio"),
    "hand-off of 2,048 tokens over 20 Mb/s, s": handoff(20, "fp16", "0.3"),
    "hand-off of 2,048 tokens over 200 Mb/s, s": handoff(200, "fp16", "0.3"),
    "the same, where nothing leaves before the last layer, s": handoff(200, "fp16 without overlap"),
    "processor time of coding ÷ that of prefill": only(
        "processor_share_of_prefill", policy="spectral", codec="spectral", budget_target=0.3
    ),
    "from the command to ready, warm caches, s": only("median_ready_seconds", command="spectrumkv up"),
    "one H200, 7B shape, 4,096 tokens: first token ÷ one process": serve("median_ttft_ms_ratio"),
    "one H200, the same: gap between tokens, ms (one process: 31.8)": serve("median_itl_ms"),
    "one H200, the same: hand-off, ms": serve("median_handoff_ms"),
}


def test_the_table_of_speed_has_the_measurements_that_are_checked() -> None:
    assert [cells[0] for cells in table("How fast it is")] == list(SPEED)


@pytest.mark.parametrize("cells", table("How fast it is"), ids=lambda cells: cells[0])
def test_every_figure_about_speed_is_in_the_results(cells: list[str]) -> None:
    what, exact, coded, file = cells
    check(f"{exact} {coded}", SPEED[what](file), what)


def test_the_other_figures_are_in_the_results() -> None:
    check("31.8", only("median_itl_ms", system="aggregated")("serve-h200.json"), "transformers on the H200")
    sent = {row["setting"]: row["kv_sent_bytes"] / 1e6 for row in rows("link.json") if row["rate_mbps"] == 20}
    check("47 14", [sent["fp16"], sent["0.3"]], "MB of 2,048 tokens")
    assert "2,048 tokens are 47 MB at FP16 and 14 MB at 0.3" in PROSE
    needles = {
        row["budget_target"]: (row["found"], row["found_fp16"], row["total"]) for row in rows("niah-prompt.json")
    }
    assert needles == dict.fromkeys(NEEDLE_BUDGETS, (95, 95, 95))
    assert "95 of 95 are found at every budget from 0.1 to 0.5" in PROSE
    crossing = only("ratio_to_raw_tcp", path="spectrumkv", policy="spectral", budget_target=0.3)
    check("0.057", crossing("transfer.json"), "transfer")
    assert "at 0.057 of raw TCP's rate" in PROSE


def test_the_output_of_the_demo_was_printed() -> None:
    shown = TEXT.split("\n## What you see\n")[1].split("```\n")[1].rstrip("\n")
    assert shown in (RESULTS / "demo.txt").read_text()
