"""Results that could not be written are refused before anything is measured."""

import argparse
from pathlib import Path

import pytest

from spectrumkv.bench.main import COMMANDS, main
from spectrumkv.bench.report.results import check_destinations
from spectrumkv.common.errors import InvalidArgumentError

# What commands cannot do without.
REQUIRED = {
    "quality": ["--text", "code"],
    "vllm-quality": ["--text", "code"],
    "goals": ["none.json"],
    "plot": ["none.json", "--plot", "plot.png"],
}


def commands_with(flag: str) -> list[str]:
    subparsers = argparse.ArgumentParser().add_subparsers()
    for command in COMMANDS:
        command.add_parser(subparsers)
    return [name for name, parser in subparsers.choices.items() if f" {flag} " in parser.format_help()]


def check(**flags: str | None) -> None:
    check_destinations(argparse.Namespace(**flags))


@pytest.mark.parametrize(
    ("command", "flag"), [(name, flag) for flag in ("--json", "--plot", "--timeline") for name in commands_with(flag)]
)
def test_every_command_looks_before_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, flag: str
) -> None:
    destination = tmp_path / "none" / ("rows.json" if flag == "--json" else "plot.png")
    for name, said in (
        (str(destination), f"{flag} {destination}: its folder does not exist"),
        ("", "the name is empty"),
    ):
        assert main([command, *REQUIRED.get(command, []), flag, name]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_commands_that_write_are_found() -> None:
    services = {"serve", "arrivals", "startup", "link", "transfer", "vllm-niah", "vllm-quality", "vllm-link"}
    assert {"quality", "niah", "goals", "codec", "coding"} | services == set(commands_with("--json"))


def test_looking_makes_and_changes_nothing(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    written.write_text("rows of yesterday")
    check(json=str(written), plot=None)
    check(json=str(tmp_path / "new.json"), plot=str(tmp_path / "new.svg"))
    assert written.read_text() == "rows of yesterday"
    assert list(tmp_path.iterdir()) == [written]


def test_a_plot_has_a_format_that_is_known() -> None:
    check()
    check(json="-")
    with pytest.raises(InvalidArgumentError, match=r"--timeline rows\.gif; allowed: a file that ends in one of"):
        check(timeline="rows.gif")
    with pytest.raises(InvalidArgumentError, match="--plot"):
        check(plot="-")
