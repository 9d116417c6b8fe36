import json
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.main import main
from spectrumkv.bench.report.goals import GOALS, MET, MISSED, WITHIN_ERROR, judge
from spectrumkv.common.errors import InvalidArgumentError
from tests.bench.report.test_plot import result, write


def row(policy: str, target: float, counted: float, kl: float, **changes: Any) -> dict[str, Any]:
    return {
        "policy": policy, "codec": "absmax", "scorer": "attention", "scope": "layer", "budget_target": target,
        "budget_counted": counted, "kl": kl, "kl_ci": [kl / 2, 2 * kl], "ppl_delta_pct": 0.01,
        "ppl_delta_pct_ci": [-0.1, 0.1], "windows": 24,
    } | changes  # fmt: skip


GREEDY = row("greedy", 0.3, 0.316, 1e-2)
OURS = row("ours", 0.3, 0.2999, 1e-4)


def test_a_goal_is_met_at_its_limit() -> None:
    (outcome,) = judge([GREEDY, OURS], "ours", "")
    assert outcome.goal.budget == 0.3
    assert outcome.kl_ratio == pytest.approx(1 / 100)
    assert (outcome.budget_verdict, outcome.delta_verdict, outcome.kl_verdict) == (MET, MET, MET)
    assert outcome.better == ()


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({"budget_counted": 0.3001}, (MISSED, MET, MET)),
        ({"budget_counted": 0.296}, (MISSED, MET, MET)),
        ({"ppl_delta_pct": 0.06}, (MET, WITHIN_ERROR, MET)),
        ({"ppl_delta_pct": 0.06, "ppl_delta_pct_ci": [0.055, 0.1]}, (MET, MISSED, MET)),
        ({"ppl_delta_pct": 0.06, "ppl_delta_pct_ci": None}, (MET, MISSED, MET)),
        ({"kl": 1.01e-4}, (MET, MET, MISSED)),
    ],
)
def test_what_falls_short_is_missed(changes: dict[str, Any], verdicts: tuple[str, str, str]) -> None:
    (outcome,) = judge([GREEDY, OURS | changes], "ours", "")
    assert (outcome.budget_verdict, outcome.delta_verdict, outcome.kl_verdict) == verdicts


def test_the_reference_is_the_papers_and_its_best() -> None:
    others = [row("greedy", 0.3, 0.316, 1e-5, scorer="random"), row("greedy", 0.3, 0.316, 1e-5, codec="other")]
    (outcome,) = judge([*others, GREEDY, row("greedy", 0.3, 0.316, 2e-2, scope="model"), OURS], "ours", "")
    assert outcome.reference == GREEDY
    (alone,) = judge([OURS], "ours", "")
    assert alone.kl_ratio is None
    assert alone.kl_verdict is None


def test_methods_with_less_kl_at_no_more_bytes_are_named() -> None:
    better, dearer = row("peer", 0.25, 0.28, 5e-5), row("peer", 0.5, 0.5, 1e-6)
    (outcome,) = judge([GREEDY, better, dearer, OURS, row("ours", 0.26, 0.26, 1e-5)], "ours", "")
    assert outcome.better == (better,)


def test_a_method_must_be_there_once() -> None:
    with pytest.raises(InvalidArgumentError, match=r"no rows of 'ours' at .* measured are greedy:absmax"):
        judge([GREEDY], "ours", "")
    twice = [OURS, OURS | {"codec": "other"}]
    with pytest.raises(InvalidArgumentError, match=r"2 rows at 0\.3, with codecs absmax, other; name one as ours:"):
        judge(twice, "ours", "")
    assert len(judge(twice, "ours", "other")) == 1


def test_the_command_reads_what_quality_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = result("x"), result("x")
    first["rows"], second["rows"] = [GREEDY], [OURS]
    files = [write(tmp_path / "a", first), write(tmp_path / "b", second)]
    written = tmp_path / "goals.json"
    assert main(["goals", *files, "--policy", "ours:absmax", "--json", str(written)]) == 0
    assert "1/100 of greedy at 0.3" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    (line,) = json.loads(written.read_text())["rows"]
    assert line["kl_verdict"] == MET
    assert line["kl_ratio_limit"] == next(goal.kl_ratio for goal in GOALS if goal.budget == 0.3)


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a", result("greedy") | {"rows": [GREEDY]})
    assert main(["goals", file, "--policy", "ours"]) == 1
    assert "no rows of 'ours'" in capsys.readouterr().err
