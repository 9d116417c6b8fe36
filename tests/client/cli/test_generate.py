import json
import sys

import pytest

from spectrumkv.client.cli.main import main
from tests.client.fake_servers import token

USAGE_FIELDS = {
    "prompt_tokens", "completion_tokens", "tiers", "kv_bytes_sent", "kv_fp16_bytes", "budget_counted",
    "budget_nominal", "ttft_seconds", "handoff_seconds", "policy", "scorer", "codec",
    "recomputed_prompt_tokens", "decode_worker", "codec_reason",
}  # fmt: skip  # fmt: skip


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


def test_generate_at_a_decode_service_says_what_it_is_not(decode_address, capsys):
    assert main(["generate", "x", "--server", decode_address]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"FAILED_PRECONDITION: {decode_address} is no prefill service of this release")


def test_timeout_exits_with_1(prefill, capsys):
    prefill.answer = lambda request, context: iter([token(0, "a")]) if prefill.ended.wait(30) else iter(())
    assert main(["generate", "x", "--server", prefill.address, "--timeout", "0.2"]) == 1
    assert capsys.readouterr().err.startswith("DEADLINE_EXCEEDED: no complete answer within 0.2 s")
