import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from spectrumkv.client.cli.main import build_parser, main
from spectrumkv.client.cli.runner import run_command
from spectrumkv.common import errors
from tests.client.fake_servers import finished, token


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["generate"], "required"),
        (["generate", "a", "--token-ids", "1"], "not allowed with"),
        (["generate", "a", "--system", "s"], "add --chat"),
        (["generate", "--token-ids", "1", "--chat"], "leave out --chat"),
        (["generate", "--token-ids", "1,x"], "separated by commas"),
        (["generate", "a", "--seed", "-1"], "seed is -1"),
        (["generate", "a", "--server", "nowhere"], "HOST:PORT"),
        *((["generate", "a", "--timeout", text], "positive number of seconds") for text in ("0", "nan", "9e9")),
        (["generate", "--prompt-file", "/does/not/exist"], "/does/not/exist"),
        (["generate", "a\udcffb"], "the prompt has '\\udcff' at character 1, which is not valid text; give UTF-8"),
        (["generate", "a", "--chat", "--system", "\udcff"], "content has '\\udcff' at character 0"),
        (["generate", "a", "--model", "\udcff"], "model has '\\udcff' at character 0"),
        (["generate", "a", "--bud", "0.5"], "unrecognized"),
        (["info", "--wait", "soon"], "positive number of seconds"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "x"], ["info"], ["check"], ["probe"]], ids=lambda words: words[0])
def test_json_that_could_not_be_written_is_noticed_before_any_work(command, prefill, tmp_path, capsys):
    path = tmp_path / "missing" / "result.json"
    server = [] if command == ["probe"] else ["--server", prefill.address]
    assert main([*command, *server, "--json", str(path)]) == 1
    out, err = capsys.readouterr()
    said = f"INVALID_ARGUMENT: --json {path}: its folder does not exist; name a file that can be written\n"
    assert (out, err) == ("", said)
    assert prefill.requests == []


def test_an_earlier_result_stays_where_the_request_fails(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("earlier")
    assert main(["generate", "x", "--server", "127.0.0.1:1", "--json", str(path)]) == 1
    assert path.read_text() == "earlier"


def test_an_error_is_one_sentence_with_the_status(prefill, capsys):
    def answer(request, context):
        raise errors.InvalidArgumentError("budget is 7; allowed: 0.25 to 1 [greedy]")
        yield

    prefill.answer = answer
    assert main(["generate", "x", "--server", prefill.address]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "INVALID_ARGUMENT: budget is 7; allowed: 0.25 to 1 [greedy]\n")


def test_unavailable_says_how_to_start_a_server(capsys):
    assert main(["generate", "x", "--server", "127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("UNAVAILABLE: ")
    assert "`spectrumkv up`" in err
    assert err.count("\n") == 1


def test_a_decode_worker_that_died_is_no_reason_to_start_a_server(prefill, capsys):
    def answer(request, context):
        yield token(0, "a")
        raise errors.UnavailableError("decode worker 127.0.0.1:50052: Socket closed")

    prefill.answer = answer
    assert main(["generate", "x", "--server", prefill.address]) == 1
    assert capsys.readouterr().err == "UNAVAILABLE: decode worker 127.0.0.1:50052: Socket closed\n"


def test_ctrl_c_cancels_the_request_and_exits_with_130(prefill):
    def answer(request, context):
        yield token(0, "first")
        prefill.ended.wait(30)

    prefill.answer = answer
    command = [sys.executable, "-m", "spectrumkv.client.cli.main", "generate", "x", "--server", prefill.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(5) == "first"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert prefill.ended.wait(10)


def test_a_reader_that_leaves_ends_the_request(prefill):
    gone = threading.Event()

    def answer(request, context):
        yield token(0, "first")
        assert gone.wait(30)
        for index in range(1, 10_000):
            yield token(index, "more")
        yield finished(10_000)

    prefill.answer = answer
    command = [sys.executable, "-m", "spectrumkv.client.cli.main", "generate", "x", "--server", prefill.address]
    reader, writer = os.pipe()
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        assert os.read(reader, 5) == b"first"
        os.close(reader)
        gone.set()
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err == ""


@pytest.mark.parametrize("flags", [[], ["--json", "-"]], ids=["text", "json"])
def test_output_on_a_full_disk_is_one_sentence(prefill, flags):
    command = [sys.executable, "-m", "spectrumkv.client.cli.main", "generate", "x", "--server", prefill.address]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, *flags], stdout=full, stderr=subprocess.PIPE, text=True, timeout=20, check=False
        )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said == "standard output cannot be written: No space left on device; send it elsewhere or make room"
    assert "Traceback" not in done.stderr


def test_an_error_of_another_file_is_not_blamed_on_the_output():
    def run(arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    with pytest.raises(OSError, match="elsewhere"):
        run_command(parser, [], lambda error, parsed: error.message)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["up", "--help"], ["demo", "--help"]])
def test_heavy_imports_stay_out(arguments):
    code = (
        "import sys\n"
        "from spectrumkv.client.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_is_there(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in ("generate", "info", "up", "demo") if f"    {name} " not in shown] == []


def generate(prefill, *flags, shell="exec", **environment):
    """Run `spectrumkv generate` in a process, by a shell that may do something first."""
    command = [sys.executable, "-m", "spectrumkv.client.cli.main", "generate", "x", "--server", prefill.address]
    return subprocess.run(
        ["/bin/sh", "-c", f'{shell} "$@"', "sh", *command, *flags],
        capture_output=True,
        timeout=30,
        check=False,
        # With this variable Python never has anything left to write at its end.
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment,
    )


def smile(request, context):
    yield token(0, "a 😀 ☃ é")
    yield finished(1)


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"a ? ? ?\n"), ("latin-1", b"a ? ? \xe9\n"), ("utf-8", "a 😀 ☃ é\n".encode())]
)
def test_an_answer_is_shown_whatever_the_terminal_s_encoding_lacks(prefill, encoding, shown):
    prefill.answer = smile
    done = generate(prefill, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, shown)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "UTF8", "utf-16"])
def test_json_loses_no_character_whatever_the_encoding(prefill, encoding, tmp_path):
    prefill.answer = smile
    done = generate(prefill, "--json", "-", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout.decode(encoding))["text"] == "a 😀 ☃ é"
    path = tmp_path / "result.json"
    assert generate(prefill, "--json", str(path), PYTHONIOENCODING=encoding).returncode == 0
    assert json.loads(path.read_text(encoding="utf-8"))["text"] == "a 😀 ☃ é"


@pytest.mark.parametrize("flags", [[], ["--json", "-"]], ids=["text", "json"])
def test_a_standard_output_that_is_closed_is_one_sentence(prefill, flags):
    done = generate(prefill, *flags, shell="exec >&-; exec")
    assert done.returncode == 1
    said = done.stderr.decode().splitlines()[-1]
    assert said == "standard output cannot be written: Bad file descriptor; send it elsewhere or make room"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- 2>&-"])
def test_other_streams_that_are_closed_change_nothing(prefill, closed):
    done = generate(prefill, shell=f"exec {closed}; exec")
    assert (done.returncode, done.stdout) == (0, b"Blue sky!\n")


def test_an_error_with_nowhere_to_be_told_still_has_its_status(prefill):
    for closed in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        assert generate(prefill, "--server", "127.0.0.1:1", shell=f"exec {closed}; exec").returncode == 1
