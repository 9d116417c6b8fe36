"""The commands end to end on a tiny model: rows, JSON, plots, errors."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.main import main
from spectrumkv.bench.methods.served_model import ServedModel
from tests.bench.conftest import TEXT
from tests.tiny_models import tiny_model

QUALITY_KEYS = [
    "policy", "codec", "budget_target", "budget_nominal", "budget_counted", "ppl", "ppl_fp16", "ppl_delta_pct",
    "kl", "top1_agreement", "windows",
]  # fmt: skip
NIAH_KEYS = ["policy", "codec", "budget_target", "budget_counted", "found", "total", "found_fp16", "by_depth"]
QUALITY_POLICIES = "native,fp16,uniform-int8,uniform-int4,greedy,sws,pdtrim,uniform-int3,pdtrim-layers"


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompts that were prefilled."""
    lengths: list[int] = []
    prefill = ServedModel.prefill

    def counting(served: ServedModel, token_ids: Any) -> Any:
        lengths.append(len(token_ids))
        return prefill(served, token_ids)

    monkeypatch.setattr(ServedModel, "prefill", counting)
    return lengths


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    result, plot = tmp_path / "result.json", tmp_path / "plot.png"
    common = ("--model", str(tiny_model("llama")), "--int4", "on", "--json", str(result), "--plot", str(plot))
    assert main([*arguments, *common]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    content: dict[str, Any] = json.loads(result.read_text())
    assert list(content) == ["meta", "rows"]
    return content


def test_quality(tmp_path: Path, text: Path, prefills: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    content = run(
        tmp_path, "quality", "--text", str(text), "--context", "96", "--scored", "16", "--windows", "2",
        "--skip-windows", "1", "--budgets", "0.5,0.3", "--policies", QUALITY_POLICIES,
    )  # fmt: skip
    rows = {(row["policy"], row["budget_target"]): row for row in content["rows"]}
    assert prefills == [96, 96]
    assert all(list(row)[: len(QUALITY_KEYS)] == QUALITY_KEYS for row in content["rows"])
    assert all(row["windows"] == 2 and row["kl_ci"][0] <= row["kl"] <= row["kl_ci"][1] for row in content["rows"])
    assert {name for name, _ in rows} == set(QUALITY_POLICIES.split(","))
    assert len({row["ppl_fp16"] for row in content["rows"]}) == 1
    fp16 = rows["fp16", 1]
    assert (fp16["kl"], fp16["ppl_delta_pct"], fp16["top1_agreement"]) == (0, 0, 1)
    assert fp16["ppl"] == fp16["ppl_fp16"]
    assert 0 <= rows["native", 1]["kl"] < 1e-4
    int8, int4, int3 = (
        rows[name]["kl"] for name in (("uniform-int8", 0.5), ("uniform-int4", 0.25), ("uniform-int3", 3 / 16))
    )
    assert rows["native", 1]["kl"] < int8 < int4 < int3
    # At 0.5 greedy is uniform INT8; between INT8 and INT4 it is between them.
    assert rows["greedy", 0.5]["kl"] == int8
    assert int8 < rows["greedy", 0.3]["kl"] < 1.5 * int4
    assert rows["greedy", 0.3]["budget_counted"] > rows["greedy", 0.3]["budget_nominal"] > 0.29
    assert "uniform-int4" in capsys.readouterr().out


def test_quality_beside_what_prefill_computed(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(
        tmp_path, "quality", "--text", str(text), "--context", "96", "--scored", "16", "--windows", "1",
        "--policies", "native,fp16", "--budgets", "1", "--reference", "native",
    )  # fmt: skip
    rows = {row["policy"]: row for row in content["rows"]}
    assert rows["native"]["kl"] == 0
    assert 0 < rows["fp16"]["kl"] < 1e-4
    assert "prefill's own KV" in capsys.readouterr().out


@pytest.mark.parametrize("question", ["prompt", "late"])
def test_niah(tmp_path: Path, prefills: list[int], question: str) -> None:
    content = run(
        tmp_path, "niah", "--context", "128", "--depths", "2", "--needles", "2", "--question", question,
        "--policies", "fp16,default,uniform-int3", "--budgets", "0.5",
    )  # fmt: skip
    assert len(prefills) == 4
    assert max(prefills) <= 128
    for row in content["rows"]:
        assert list(row)[: len(NIAH_KEYS)] == NIAH_KEYS
        assert row["total"] == 4
        assert [depth["total"] for depth in row["by_depth"]] == [2, 2]
        assert sum(depth["found"] for depth in row["by_depth"]) == row["found"]
    fp16 = content["rows"][0]
    assert (fp16["policy"], fp16["found"]) == ("fp16", fp16["found_fp16"])
    assert 1 < fp16["budget_counted"] < 1.1


def test_results_say_what_they_were_measured_with_and_not_where(tmp_path: Path, text: Path) -> None:
    content = run(
        tmp_path, "quality", "--text", str(text), "--context", "64", "--scored", "8", "--windows", "1",
        "--policies", "uniform-int8",
    )  # fmt: skip
    meta = content["meta"]
    assert {"python", "torch", "transformers", "spectrumkv"} <= set(meta["versions"])
    assert meta["machine"]["cores"] >= 1
    assert meta["machine"]["memory_bytes"] > 0
    assert meta["machine"]["cpu"]
    assert len(meta["model"]["weights_digest"]) == 64
    assert meta["args"]["context"] == 64
    assert meta["args"]["text"] == "text.txt"
    written = json.dumps(content)
    assert str(tmp_path) not in written
    assert str(tiny_model("llama").parent) not in written
    assert socket.gethostname() not in json.dumps(meta["machine"])


def test_json_on_standard_output_stands_alone(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["quality", "--text", str(text), "--context", "64", "--scored", "8", "--windows", "1", "--int4", "on",
         "--policies", "uniform-int8", "--model", str(tiny_model("llama")), "--json", "-"]
    )  # fmt: skip
    assert code == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", "4000"], "windows of 4000 + 8"),
        (["--plot", "plot.gif"], "--plot plot.gif; allowed"),
        (["--plot", "none/plot.png"], "its folder does not exist"),
        (["--policies", "best"], "unknown policy 'best'"),
        (["--int4", "perhaps"], "--int4 is 'perhaps'"),
    ],
)
def test_errors_are_one_sentence(
    text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    model = ["--model", str(tiny_model("llama")), "--scored", "8", "--windows", "1"]
    assert main(["quality", "--text", str(text), *model, "--context", "64", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
