"""What plot and goals read is checked when it is read, and a sentence names the file and the field."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.main import main
from spectrumkv.bench.report.quality_runs import MODEL_TEXTS, ROW_INTERVALS, ROW_NUMBERS, ROW_TEXTS, read_result
from spectrumkv.common.errors import InvalidArgumentError
from tests.bench.report.test_plot import result, write

RESULTS = sorted((Path(__file__).parents[3] / "bench" / "results").glob("quality-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_published_results_can_be_read(path: Path) -> None:
    assert read_result(path) == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [["plot", "--plot", "{folder}/plot.png"], ["goals"]], ids=["plot", "goals"])
def test_both_commands_name_the_file_and_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    content = result("spectral")
    for row in content["rows"]:
        row["kl"] = "x"
    file = write(tmp_path / "quality.json", content)
    assert main([*(part.format(folder=tmp_path) for part in command), file]) == 1
    error = capsys.readouterr().err
    assert f"{file}: rows[0].kl is 'x'; allowed: a number" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *((name, 1, "a text") for name in ROW_TEXTS),
        *((name, value, "a number") for name in ROW_NUMBERS for value in ("x", None, True)),
        *((name, value, "two numbers or null") for name in ROW_INTERVALS for value in (1, [1], ["a", "b"])),
    ],
)
def test_rows_are_of_the_right_kind(tmp_path: Path, name: str, value: Any, allowed: str) -> None:
    content = result("greedy")
    content["rows"][1][name] = value
    with pytest.raises(InvalidArgumentError) as refused:
        read_result(Path(write(tmp_path / "a", content)))
    assert refused.value.message == (
        f"{tmp_path / 'a'}: rows[1].{name} is {value!r}; allowed: {allowed}, as quality writes it"
    )


@pytest.mark.parametrize("name", [one for one in (*ROW_TEXTS, *ROW_NUMBERS, *ROW_INTERVALS) if one != "kl"])
def test_rows_lack_nothing(tmp_path: Path, name: str) -> None:
    content = result("greedy")
    del content["rows"][0][name]
    with pytest.raises(InvalidArgumentError, match=rf"rows\[0\]\.{name} is missing"):
        read_result(Path(write(tmp_path / "a", content)))


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ([], "meta is []"),
        ({}, "meta.args is missing"),
        ({"args": {}, "model": None}, "meta.model is None"),
        *(
            ({"args": {}, "model": dict.fromkeys(MODEL_TEXTS, "x") | {name: 1}}, f"meta.model.{name} is 1")
            for name in MODEL_TEXTS
        ),
    ],
)
def test_the_model_is_described(tmp_path: Path, meta: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        read_result(Path(write(tmp_path / "a", result("greedy") | {"meta": meta})))
    assert f"{tmp_path / 'a'}: {said}; allowed" in refused.value.message


@pytest.mark.parametrize("rows", [None, [], 5, "kl", [1], ["kl"], {"kl": 1}, [{"found": 3}]])
def test_rows_of_others_are_refused(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="has no rows of quality"):
        read_result(Path(write(tmp_path / "a", result("greedy") | {"rows": rows})))


def test_one_window_has_no_interval(tmp_path: Path) -> None:
    content = result("greedy", windows=1)
    for row in content["rows"]:
        row |= {"windows": 1, "kl_ci": None, "ppl_delta_pct_ci": None}
    file = write(tmp_path / "a", content)
    assert read_result(Path(file)) == content
    assert main(["plot", file, "--plot", str(tmp_path / "plot.png")]) == 0
