import json
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.main import main


def result(policy: str, **changes: Any) -> dict[str, Any]:
    arguments = {"context": 96, "scored": 16, "skip_windows": 0, "windows": 2, "text_sha256": "ab"} | changes
    rows = [
        {
            "policy": policy, "codec": "absmax", "scorer": "", "scope": "layer", "budget_target": budget,
            "budget_counted": budget, "kl": 0.01 / budget, "kl_ci": [0.005 / budget, 0.02 / budget],
            "ppl_delta_pct": 0.1 / budget, "ppl_delta_pct_ci": [-0.1, 1.0], "windows": 2,
        }
        for budget in (0.5, 0.25)
    ]  # fmt: skip
    model = {"name": "tiny", "weights_digest": "cd", "dtype": "float32"}
    return {"meta": {"args": arguments, "model": model}, "rows": rows}


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_several_runs_share_a_plot(tmp_path: Path, form: str) -> None:
    ours, theirs = write(tmp_path / "a", result("greedy")), write(tmp_path / "b", result("kvpress-snapkv"))
    plot = tmp_path / f"plot.{form}"
    assert main(["plot", ours, theirs, "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 5000
    if form == "svg":
        # Text is drawn as glyphs, and what they spell stands beside them.
        drawn = plot.read_text()
        assert "greedy" in drawn
        assert "kvpress-snapkv" in drawn


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (result("greedy", windows=3), "has windows 3 and"),
        (result("greedy", text_sha256="ef"), "has text_sha256 'ef' and"),
        ({"meta": {}, "rows": []}, "has no rows of quality"),
        ([1], "has no rows of quality"),
    ],
)
def test_other_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, said: str) -> None:
    ours, theirs = write(tmp_path / "a", result("greedy")), write(tmp_path / "b", content)
    assert main(["plot", ours, theirs, "--plot", str(tmp_path / "plot.png")]) == 1
    assert said in capsys.readouterr().err


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text")
    for path, said in ((tmp_path / "text", "is not JSON"), (tmp_path / "none", "No such file")):
        assert main(["plot", str(path), "--plot", str(tmp_path / "plot.png")]) == 1
        assert said in capsys.readouterr().err
