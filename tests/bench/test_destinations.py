"""Results that could not be written are refused before anything is measured."""

import argparse
import os
from pathlib import Path

import pytest

from spectrumkv.bench.command_line import COMMANDS, main
from spectrumkv.bench.destinations import check_destinations
from spectrumkv.common.errors import InvalidArgumentError

# What commands cannot do without.
REQUIRED = {"quality": ["--text", "code"], "goals": ["none.json"], "plot": ["none.json", "--plot", "plot.png"]}


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
        (str(destination), f"{flag} {destination}: its folder does not exist; make"),
        ("", "is empty"),
    ):
        assert main([command, *REQUIRED.get(command, []), flag, name]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_commands_that_write_are_found() -> None:
    assert {"quality", "niah", "goals", "codec", "coding", "transfer", "serve", "arrivals", "startup", "link"} == set(
        commands_with("--json")
    )


def test_looking_makes_and_changes_nothing(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    written.write_text("rows of yesterday")
    check(json=str(written), plot=None)
    check(json=str(tmp_path / "new.json"), plot=str(tmp_path / "new.svg"))
    assert written.read_text() == "rows of yesterday"
    assert list(tmp_path.iterdir()) == [written]


def test_what_is_no_plain_file_can_be_written_too() -> None:
    check()
    check(json=None, plot=None)
    check(json="-")
    check(json="beside.json")
    check(json=os.devnull)


def test_a_link_to_a_file_that_does_not_exist_yet_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "rows.json"
    link.symlink_to(tmp_path / "there" / "rows.json")
    check(json=str(link))
    (tmp_path / "there").rmdir()
    with pytest.raises(InvalidArgumentError, match=f"its folder does not exist; make {tmp_path / 'there'}"):
        check(json=str(link))


def test_the_sentence_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, said in (
        ("", "--json is empty; name a file, or '-' for standard output"),
        (str(tmp_path), "is a folder; name a file"),
        (str(tmp_path / "file" / "rows.json"), "Not a directory; name a file that can be written"),
        (str(tmp_path / ("x" * 300)), "File name too long; name a file that can be written"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            check(json=name)
    with pytest.raises(InvalidArgumentError, match=r"--timeline rows\.gif; allowed: a file that ends in one of"):
        check(timeline="rows.gif")
    with pytest.raises(InvalidArgumentError, match=r"--plot is empty; name a file that ends in one of \.png"):
        check(plot="")


def test_what_belongs_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "rows.json"
    written.write_text("rows of yesterday")
    # Whoever runs the tests may be root, who may write everything.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(InvalidArgumentError, match=r"rows\.json may not be written"):
        check(json=str(written))
    with pytest.raises(InvalidArgumentError, match=f"its folder {tmp_path} may not be written"):
        check(json=str(tmp_path / "new.json"))
