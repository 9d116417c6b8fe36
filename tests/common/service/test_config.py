import argparse
from dataclasses import MISSING, fields

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.command_line import add_flags, load
from spectrumkv.common.service.config import (
    Address,
    DecodeConfig,
    PrefillConfig,
    ServerConfig,
    build,
    flag_name,
    text_of,
)
from spectrumkv.common.service.options import allowed_by, some_text

CONFIGS = [PrefillConfig, DecodeConfig]
OPTIONS = [(config, declared) for config in CONFIGS for declared in fields(config)]
IDS = [f"{config.__name__}-{declared.name}" for config, declared in OPTIONS]
FLAGS = [(config, declared) for config, declared in OPTIONS if isinstance(declared.default, bool)]
TEXTS = [
    (config, declared)
    for config, declared in OPTIONS
    if (declared.default is None or isinstance(declared.default, str))
    and declared.name not in ("threads", "budget", "prefill_kv_memory", "max_connections_per_address")
]
VALUES = [one for one in OPTIONS if one not in FLAGS and one not in TEXTS]


def refusal(config, given):
    with pytest.raises(InvalidArgumentError) as caught:
        build(config, given)
    return caught.value.message


@pytest.mark.parametrize(("config", "declared"), OPTIONS, ids=IDS)
def test_a_default_printed_and_read_back_is_itself(config, declared):
    assert declared.default is not MISSING
    if declared.default is None:
        return
    given = declared.default if isinstance(declared.default, bool) else text_of(declared.default)
    read = getattr(build(config, {declared.name: given}), declared.name)
    assert read == declared.default
    assert type(read) is type(declared.default)


@pytest.mark.parametrize("config", CONFIGS)
def test_help_lists_every_option_with_what_is_allowed_and_its_default(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        load(config, ["--help"], "spectrumkv-server")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for declared in fields(config):
        default = declared.default
        said = "no" if default is False else declared.metadata["shown"] or text_of(default)
        notes = [] if isinstance(default, bool) else [allowed_by(declared.metadata["parse"])]
        notes += [] if default is None else [f"default: {said}"]
        text = declared.metadata["help"] + (f" ({'; '.join(filter(None, notes))})" if any(notes) else "")
        flag = flag_name(declared.name)
        flag += f", --no-{flag[2:]}" if isinstance(default, bool) else " VALUE"
        assert f" {flag} {text}" in shown


def test_help_says_which_words_and_numbers_there_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        load(DecodeConfig, ["--help"], "spectrumkv-decode")
    shown = capsys.readouterr().out
    for part in (
        "(one of auto, cpu, cuda; default: auto)",
        "(a positive number of bytes such as 512MiB or 4GiB; default: 1GiB)",
        "(a whole number from 1 to 1024; default: 32)",
        "(one of text, json; default: text)",
    ):
        assert part in shown


def test_help_writes_whole_numbers_whole_and_says_what_each_kind_of_budget_counts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        load(PrefillConfig, ["--help"], "spectrumkv-prefill")
    shown = capsys.readouterr().out
    assert "(a whole number from 1024 to 1048576; default: 524288)" in shown
    assert "e+0" not in shown
    [budget] = [line for line in shown.splitlines() if line.lstrip().startswith("--budget ")]
    assert "policy spectral counts all bytes sent" in budget
    assert "other policies count the mean cost per token" in budget


def test_a_worker_is_named_once():
    given = {"decode": "127.0.0.1:1,localhost:2,127.0.0.1:1"}
    assert refusal(PrefillConfig, given) == "--decode names 127.0.0.1:1 more than once; name each worker once"


@pytest.mark.parametrize(("config", "declared"), VALUES, ids=[f"{one.__name__}-{two.name}" for one, two in VALUES])
@pytest.mark.parametrize("value", ["", "nonsense", "-1", "nan", "inf", "-inf", "1e400", "²", "1 2"])
def test_a_value_that_is_not_allowed_is_refused_with_flag_value_and_what_is(config, declared, value):
    message = refusal(config, {declared.name: value})
    start, allowed = message.split("; allowed: ")
    assert start == f"{flag_name(declared.name)} is {value!r}"
    assert allowed.startswith(("a ", "HOST:PORT", "one of"))


def test_a_budget_may_be_left_to_the_probe():
    assert build(PrefillConfig, {}).budget is None
    assert build(PrefillConfig, {"budget": "auto"}).budget is None
    assert build(PrefillConfig, {"budget": "0.25"}).budget == 0.25
    assert refusal(PrefillConfig, {"budget": "2"}) == "--budget is '2'; allowed: a number from 0.05 to 1, or auto"


def test_the_connections_of_an_address_may_be_left_to_the_service():
    assert build(DecodeConfig, {"max_connections_per_address": "auto"}).max_connections_per_address is None
    assert build(DecodeConfig, {"max_connections_per_address": "9"}).max_connections_per_address == 9
    assert "a whole number from 1 to 65536, or auto" in refusal(DecodeConfig, {"max_connections_per_address": "0"})


def test_the_memory_of_prefill_may_be_left_to_it():
    assert build(PrefillConfig, {"prefill_kv_memory": "auto"}).prefill_kv_memory is None
    assert build(PrefillConfig, {"prefill_kv_memory": "2GiB"}).prefill_kv_memory == 2 << 30


@pytest.mark.parametrize(
    ("config", "declared"),
    [one for one in TEXTS if one[1].metadata["parse"] is not some_text],
    ids=lambda one: getattr(one, "name", None),
)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(config, declared):
    message = refusal(config, {declared.name: "Auto "})
    assert message.startswith(f"{flag_name(declared.name)} is 'Auto '; allowed: one of ")
    for choice in message.partition("one of ")[2].split(", "):
        assert getattr(build(config, {declared.name: choice}), declared.name) == choice


@pytest.mark.parametrize(("config", "declared"), TEXTS, ids=[f"{one.__name__}-{two.name}" for one, two in TEXTS])
def test_a_text_that_is_none_is_refused(config, declared):
    assert refusal(config, {declared.name: ""}).startswith(f"{flag_name(declared.name)} is ''; allowed: ")


@pytest.mark.parametrize(("config", "declared"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("value", ["{a = 1}", "1979-05-27", "[[1]]"])
def test_a_toml_value_of_a_wrong_kind_is_refused_by_name(config, declared, value, tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(f"{declared.name} = {value}\n")
    with pytest.raises(InvalidArgumentError, match=rf"^{flag_name(declared.name)} is .*; allowed: "):
        load(config, ["--config", str(path)], "server")


@pytest.mark.parametrize(("config", "declared"), OPTIONS, ids=IDS)
def test_true_is_for_flags_only(config, declared):
    if isinstance(declared.default, bool):
        assert getattr(build(config, {declared.name: True}), declared.name) is True
        assert "allowed: true or false" in refusal(config, {declared.name: "yes"})
    else:
        assert (
            refusal(config, {declared.name: True}) == f"{flag_name(declared.name)} is True; allowed: text or a number"
        )


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "prefill.toml"
    path.write_text(
        'allow_plaintext = true\nbudget = 0.25\nwindow = 32\nscope = "model"\nreflection = true\n'
        'decode = ["10.0.0.1:50052", "[::1]:50053"]\nlisten = "127.0.0.1:7000"\n'
    )
    arguments = ["--config", str(path), "--window", "16", "--no-reflection", "--listen=[::1]:7001"]
    config = load(PrefillConfig, arguments, "spectrumkv-prefill")
    assert (config.budget, config.window, config.scope, config.reflection) == (0.25, 16, "model", False)
    assert config.decode == (Address("10.0.0.1", 50052), Address("[::1]", 50053))
    assert config.listen == Address("[::1]", 7001)
    assert config.codec == PrefillConfig.codec


def test_sizes_in_a_file_are_text_or_whole_numbers(tmp_path):
    path = tmp_path / "decode.toml"
    for written, size in [('"4GiB"', 4 << 30), ("1000000", 1_000_000), ('"1.5 GB"', 1_500_000_000)]:
        path.write_text(f"kv_memory = {written}\n")
        assert load(DecodeConfig, ["--config", str(path)], "decode").kv_memory == size


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("key", ["kv-memory", "Listen", "budgett", "config"])
def test_an_unknown_key_is_refused_with_the_valid_ones(config, key, tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(f"{key} = 1\n")
    with pytest.raises(InvalidArgumentError) as caught:
        load(config, ["--config", str(path)], "server")
    assert caught.value.message.startswith(f"unknown option {key!r}; allowed: ")
    for declared in fields(config):
        assert declared.name in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budgett", "1"], "unrecognized arguments: --budgett 1"),
        (["--budg", "0.5"], "unrecognized arguments: --budg 0.5"),
        (["--kv-memory", "1GiB"], "unrecognized arguments: --kv-memory 1GiB"),
        (["stray"], "unrecognized arguments: stray"),
        (["--budget"], "argument --budget: expected one argument"),
    ],
)
def test_an_unknown_flag_is_refused(arguments, said):
    with pytest.raises(InvalidArgumentError) as caught:
        load(PrefillConfig, arguments, "spectrumkv-prefill")
    assert caught.value.message == f"{said}; spectrumkv-prefill --help lists the options"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"budget = ", "is not a TOML file"),
        (b"\xff", "is not a TOML file"),
        (b"x = " + b"[" * 5000, "is not a TOML file"),
        (b"max_running = " + b"1" * 5000, "is not a TOML file"),
        (b"\xef\xbb\xbfmax_running = 1", "is not a TOML file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(content, said, tmp_path):
    path = tmp_path / "server.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=f"^--config {path} {said}"):
        load(DecodeConfig, ["--config", str(path)], "server")


@pytest.mark.parametrize(
    "value", ["0x" + "f" * 6000, "inf", "nan", "1e400", "1979-05-27", "{a = 1}", "[[1]]", '"\\u0000"']
)
@pytest.mark.parametrize("option", ["max_running", "kv_memory", "grace", "listen", "log_level"])
def test_a_value_of_another_kind_is_refused_with_its_flag(option, value, tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(f"{option} = {value}")
    with pytest.raises(InvalidArgumentError, match=f"^--{option.replace('_', '-')} is .*allowed"):
        load(DecodeConfig, ["--config", str(path)], "server")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_flag_that_is_not_given_leaves_no_trace(config):
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--grace", "5", "--reflection"])) == {"grace": "5", "reflection": True}


def test_both_services_share_the_options_of_a_server():
    shared = {declared.name for declared in fields(ServerConfig)}
    for config in CONFIGS:
        assert shared < {declared.name for declared in fields(config)}


def test_configurations_cannot_change():
    config = build(DecodeConfig, {})
    with pytest.raises(AttributeError):
        config.grace = 0.0  # type: ignore[misc]
    assert config.grace == DecodeConfig.grace


def test_the_default_deadline_is_no_later_than_the_latest() -> None:
    with pytest.raises(InvalidArgumentError, match="--deadline is 7200, more than --max-deadline allows"):
        build(DecodeConfig, {"deadline": "7200"})
    assert build(DecodeConfig, {"deadline": "7200", "max_deadline": "7200"}).max_deadline == 7200
