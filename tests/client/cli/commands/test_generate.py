import json
import sys

import pytest

from spectrumkv.client.cli.main import main
from spectrumkv.v1 import generation_pb2, prefill_pb2
from tests.client.fake_servers import finished, token

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


def test_flags_of_the_answers_reach_the_request(prefill, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    flags = """
        --presence-penalty 0.5 --frequency-penalty -0.5 --min-p 0.1 --logit-bias 11:-100,12:2.5 --min-tokens 3
        --bad-word dog --bad-word cat --n 2 --prompt-logprobs 1
    """
    form = ["--json-schema", str(schema)]
    assert main(["generate", "Why?", "--server", prefill.address, *flags.split(), *form]) == 0
    (request,) = prefill.requests
    assert request.prompt_logprobs == 1
    assert request.sampling.structured_output.json_schema == '{"type": "object"}'
    sampling = {field.name: value for field, value in request.sampling.ListFields()}
    del sampling["structured_output"]
    assert sampling == {
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "min_p": 0.1, "logit_bias": {11: -100.0, 12: 2.5},
        "min_tokens": 3, "bad_words": ["dog", "cat"], "n": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--json-object"], "json_object"),
        (["--regex", "a+"], "regex"),
        (["--choice", "yes", "--choice", "no"], "choice"),
    ],
)
def test_each_form_has_a_flag(prefill, arguments, kind):
    assert main(["generate", "Why?", "--server", prefill.address, *arguments]) == 0
    assert prefill.requests[0].sampling.structured_output.WhichOneof("form") == kind


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--logit-bias", "a:b"], "'a:b'; allowed: numbers by token id: 11:-100,12:2.5"),
        (["--regex", "a", "--json-object"], "not allowed with argument"),
        (["--grammar", "/nowhere"], "--grammar /nowhere: "),
    ],
)
def test_flags_that_cannot_be_used_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "x", *arguments])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_several_answers_are_written_one_after_another_behind_the_prompt(prefill, capsys):
    def answer_twice(request, context):
        prompt = prefill_pb2.PromptTokens(tokens=[prefill_pb2.PromptToken(token_id=5, text="Why? ")])
        yield prefill_pb2.GenerateResponse(prompt_tokens=prompt)
        for index in range(2):
            for answer, text in enumerate(("Blue ", "Red ")):
                one = generation_pb2.Token(index=index, token_id=7, text=text, answer=answer)
                yield prefill_pb2.GenerateResponse(token=one)
        yield finished(4)

    prefill.answer = answer_twice
    assert main(["generate", "Why? ", "--server", prefill.address, "--n", "2", "--echo"]) == 0
    assert prefill.requests[0].echo
    assert capsys.readouterr().out == "--- answer 0\nWhy? Blue Blue \n--- answer 1\nWhy? Red Red \n"


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
