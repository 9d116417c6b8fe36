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
from tests.client.fake_servers import FakePrefill, finished, prefill_server, serving, token

USAGE_FIELDS = {
    "prompt_tokens", "completion_tokens", "tiers", "kv_bytes_sent", "kv_fp16_bytes", "budget_counted",
    "budget_nominal", "ttft_seconds", "handoff_seconds", "policy", "scorer", "codec",
    "recomputed_prompt_tokens", "decode_worker", "codec_reason",
}  # fmt: skip


def test_generate_streams_text_and_reports_usage(prefill, capsys):
    assert main(["generate", "Why?", "--server", prefill.address]) == 0
    out, err = capsys.readouterr()
    assert out == "Blue sky!\n"
    for shown in ("40 + 3 tokens (stop)", "0.562 (0.550)", "9,000 / 16,000", "int8", "36.0 tokens, 7,200 bytes"):
        assert shown in err
    assert "125.0 ms at the server" in err
    assert "250.0 ms at the server" in err


def test_generate_json_to_a_file(prefill, tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--seed", "0", "--stop", "a", "--stop", "b", "--budget", "0.5", "--json", str(path)]
    assert main(["generate", "Why?", "--server", prefill.address, *arguments]) == 0
    assert capsys.readouterr().out == "Blue sky!\n"
    result = json.loads(path.read_text())
    assert result["text"] == "Blue sky!"
    assert result["token_ids"] == [100, 101, 102]
    assert result["finish_reason"] == "stop"
    assert set(result["usage"]) == USAGE_FIELDS
    assert set(result["timings"]) == {"ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "handoff_ms"}
    assert len(result["timings"]["itl_ms"]) == 2
    assert result["request"] == {
        "prompt": {"text": "Why?"},
        "sampling": {"seed": 0, "stop": ["a", "b"]},
        "kv": {"budget": 0.5},
    }


def test_generate_json_on_stdout_is_all_there_is(prefill, capsys):
    assert main(["generate", "Why?", "--server", prefill.address, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Blue sky!"


def test_every_flag_reaches_the_request(prefill):
    flags = """
        --model m --budget 0.3 --policy greedy --codec absmax --scorer attention --scope model --max-tokens 5
        --temperature 0.7 --top-p 0.9 --top-k 40 --repetition-penalty 1.1 --seed 7 --stop END
        --stop-token-ids 2,3 --ignore-eos --logprobs 4
    """
    assert main(["generate", "Why?", "--server", prefill.address, *flags.split()]) == 0
    (request,) = prefill.requests
    assert request.model == "m"
    assert {field.name: value for field, value in request.kv.ListFields()} == {
        "budget": 0.3, "policy": "greedy", "codec": "absmax", "scorer": "attention", "scope": "model",
    }  # fmt: skip
    assert {field.name: value for field, value in request.sampling.ListFields()} == {
        "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "seed": 7,
        "stop": ["END"], "stop_token_ids": [2, 3], "ignore_eos": True, "logprobs": 4,
    }  # fmt: skip


def test_prompts_from_files_chats_and_token_ids(prefill, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text("naïve\n", encoding="utf-8")
    server = ["--server", prefill.address]
    assert main(["generate", "--prompt-file", str(path), *server]) == 0
    with path.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["generate", "--prompt-file", "-", *server]) == 0
    assert main(["generate", "hi", "--chat", "--system", "Be brief.", *server]) == 0
    assert main(["generate", "--token-ids", "1, 2,3", *server]) == 0
    assert main(["generate", "", *server]) == 0
    from_file, from_stdin, chat, ids, empty = prefill.requests
    assert from_file.text == from_stdin.text == "naïve\n"
    assert [(turn.role, turn.content) for turn in chat.chat.messages] == [("system", "Be brief."), ("user", "hi")]
    assert list(ids.token_ids.ids) == [1, 2, 3]
    assert empty.WhichOneof("prompt") == "text"


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
        (["generate", "a", "--timeout", "0"], "positive number of seconds"),
        (["generate", "--prompt-file", "/does/not/exist"], "/does/not/exist"),
        (["generate", "a\udcffb"], "the prompt has '\\udcff' at character 1, which is no text; give valid UTF-8"),
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


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_prompt_file_that_is_not_utf_8(source, tmp_path, monkeypatch, capsys):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xff\xfe")
    named = str(path) if source == "file" else "-"
    # What Python makes of standard input in the C locale.
    with path.open(encoding="utf-8", errors="surrogateescape") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as caught:
            main(["generate", "--prompt-file", named])
    assert caught.value.code == 2
    assert f"--prompt-file {named}: 'utf-8' codec can't decode byte 0xff" in capsys.readouterr().err


def test_a_prompt_from_a_standard_input_that_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--prompt-file", "-"])
    assert caught.value.code == 2
    assert "--prompt-file -: standard input is closed" in capsys.readouterr().err


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


def test_generate_at_a_decode_service_says_what_it_is_not(decode_address, capsys):
    assert main(["generate", "x", "--server", decode_address]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"FAILED_PRECONDITION: {decode_address} is no prefill service of this release")


def test_timeout_exits_with_1(prefill, capsys):
    prefill.answer = lambda request, context: iter([token(0, "a")]) if prefill.ended.wait(30) else iter(())
    assert main(["generate", "x", "--server", prefill.address, "--timeout", "0.2"]) == 1
    assert capsys.readouterr().err.startswith("DEADLINE_EXCEEDED: no complete answer within 0.2 s")


def test_info_of_prefill(prefill, capsys):
    assert main(["info", "--server", prefill.address, "--wait", "10"]) == 0
    out = capsys.readouterr().out
    for shown in (
        "ready", "tiny-llama", "30 layers, 3 KV heads of 64", "policy greedy", "budget 0.25 to 1",
        "attention, position", "absmax v1", "budget 0.5, policy adaptive", "allowed (probe)",
        "2 of 3 needles [found]", "[/b] 7", "127.0.0.1:50052, 127.0.0.1:50062 (takes no requests)",
        "4.9e-05", "+0.038", "2 of 3", "-0.500",
    ):  # fmt: skip
        assert shown in out


def test_info_as_json(prefill, decode_address, capsys):
    assert main(["info", "--server", prefill.address, "--json", "-"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["service"], info["serving"], info["model"]["kv_heads"]) == ("prefill", True, 3)
    assert info["policies"] == [{"name": "greedy", "min_budget": 0.25, "max_budget": 1.0}]
    assert [trial["found"] for trial in info["int4_probe"]["trials"]] == [True, False]
    assert [one["safe"] for one in info["int4_probe"]["settings"]] == [True, False]
    assert info["int4_probe"]["safe_budget"] == 0.25
    assert main(["info", "--server", decode_address, "--json", "-"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["service"], info["slots_total"]) == ("decode", 2**40)


def test_info_of_decode(decode_address, capsys):
    assert main(["info", "--server", decode_address]) == 0
    assert "512 of 1,099,511,627,776 reserved" in capsys.readouterr().out


def test_info_of_a_server_that_is_not_ready(capsys):
    server = prefill_server(FakePrefill())
    with serving(server) as address:
        server._health.enter_graceful_shutdown()
        assert main(["info", "--server", address]) == 1
        assert "NOT ready" in capsys.readouterr().out
        assert main(["info", "--server", address, "--wait", "0.2"]) == 1
        assert capsys.readouterr().err.startswith("DEADLINE_EXCEEDED: ")


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
