import math
import subprocess
import sys
import threading

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import Sampling
from spectrumkv.common import errors
from spectrumkv.common.rpc.server import Server
from spectrumkv.v1 import prefill_pb2
from tests.client.fake_servers import finished, serving, token


@pytest.fixture
def client(prefill):
    with SpectrumClient(prefill.address) as client:
        yield client


def test_tokens_then_the_completion(client):
    stream = client.generate("Why is the sky blue?")
    assert [one.text for one in stream] == ["Blue", " sky", "!"]
    completion = stream.result()
    assert completion.text == "Blue sky!"
    assert completion.token_ids == (100, 101, 102)
    assert completion.finish_reason == "stop"
    assert completion.usage.budget_counted == 0.5625
    assert [(tier.tier, tier.tokens, tier.bytes) for tier in completion.usage.tiers] == [
        ("fp16", 4.0, 1600),
        ("int8", 36.0, 7200),
    ]
    assert completion.usage.decode_worker == "127.0.0.1:50052"


def test_tokens_are_handed_over_as_they_arrive(prefill, client):
    first_was_seen = threading.Event()

    def answer(request, context):
        yield token(0, "a")
        assert first_was_seen.wait(10)
        yield token(1, "b")
        yield finished(2)

    prefill.answer = answer
    stream = client.generate("x")
    assert next(stream).text == "a"
    first_was_seen.set()
    completion = stream.result()
    arrivals = [one.arrived_seconds for one in completion.tokens]
    assert 0 < arrivals[0] < arrivals[1] <= completion.finished.arrived_seconds
    assert completion.timings.handoff_ms == pytest.approx((arrivals[1] - arrivals[0]) * 1000)


def test_logprobs(prefill, client):
    def answer(request, context):
        response = token(0, "a")
        response.token.logprob = -0.5
        response.token.top_logprobs.add(token_id=9, logprob=-1.5)
        yield response
        yield token(1, "b")
        yield finished(2)

    prefill.answer = answer
    completion = client.generate("x", sampling=Sampling(logprobs=1)).result()
    assert [one.logprob for one in completion.tokens] == [-0.5, None]
    top = [{"token_id": 9, "logprob": -1.5}]
    assert completion.as_json()["logprobs"] == [{"token_id": 100, "logprob": -0.5, "top_logprobs": top}]


@pytest.mark.parametrize(
    "raised",
    [
        errors.InvalidArgumentError("--budget is 7; allowed: 0.25 to 1"),
        errors.NotFoundError("model 'x' is not served"),
        errors.FailedPreconditionError("head_dim is 64 here and 128 there"),
        errors.UnavailableError("no decode worker answers"),
        errors.DataLossError("chunk 3 came twice", "duplicate"),
        errors.InternalError("broken"),
    ],
    ids=lambda error: error.code,
)
def test_an_error_of_the_server_arrives_as_it_was(prefill, client, raised):
    def answer(request, context):
        yield token(0, "a")
        raise raised

    prefill.answer = answer
    stream = client.generate("x")
    assert next(stream).text == "a"
    with pytest.raises(type(raised)) as caught:
        stream.result()
    assert caught.value.message == raised.message


def test_a_full_server_says_when_to_try_again(prefill, client):
    def answer(request, context):
        raise errors.ResourceExhaustedError("no slots", retry_after_seconds=2.25)
        yield

    prefill.answer = answer
    with pytest.raises(errors.ResourceExhaustedError, match="no slots") as caught:
        client.generate("x").result()
    assert caught.value.retry_after_seconds == 2.25


def test_the_deadline_ends_the_request_on_both_sides(prefill, client):
    def answer(request, context):
        yield token(0, "a")
        prefill.ended.wait(30)

    prefill.answer = answer
    with pytest.raises(errors.DeadlineExceededError, match=r"within 0\.3 s \(1 tokens had come\)"):
        client.generate("x", timeout=0.3).result()
    assert prefill.ended.wait(10)


@pytest.mark.parametrize("leave", ["cancel", "with", "close"])
def test_leaving_ends_the_request_at_the_server(prefill, client, leave):
    def answer(request, context):
        yield token(0, "a")
        prefill.ended.wait(30)

    prefill.answer = answer
    stream = client.generate("x")
    assert next(stream).text == "a"
    if leave == "cancel":
        stream.cancel()
    elif leave == "close":
        client.close()
    else:
        with stream:
            pass
    assert prefill.ended.wait(10)
    with pytest.raises(errors.CancelledError):
        next(stream)


@pytest.mark.parametrize(
    ("responses", "what"),
    [
        ([token(0, "a")], "after 1 tokens without a result"),
        ([token(1, "a")], "token 1 of answer 0 arrived where token 0 was due"),
        ([token(0, "a"), token(0, "a")], "token 0 of answer 0 arrived where token 1 was due"),
        ([finished(0), token(0, "a")], "more after the result"),
    ],
)
def test_a_stream_that_breaks_the_protocol_gives_no_completion(prefill, client, responses, what):
    prefill.answer = lambda request, context: iter(responses)
    with pytest.raises(errors.InternalError, match=what):
        client.generate("x").result()


def test_an_error_after_the_result_is_not_overlooked(prefill, client):
    def answer(request, context):
        yield finished(0)
        raise errors.DataLossError("the digest differs", "digest")

    prefill.answer = answer
    with pytest.raises(errors.DataLossError):
        client.generate("x").result()


def test_nobody_listens():
    with SpectrumClient("127.0.0.1:1") as client, pytest.raises(errors.UnavailableError):
        client.generate("x").result()


def test_server_info_of_either_service(client, decode_address):
    info = client.server_info()
    assert isinstance(info, prefill_pb2.PrefillServiceGetServerInfoResponse)
    assert client.is_serving()
    with SpectrumClient(decode_address) as other:
        assert other.server_info().slots_used == 512


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.generate("x"),
        lambda client: client.server_info(),
        lambda client: client.is_serving(),
    ],
    ids=["generate", "server_info", "is_serving"],
)
def test_a_closed_client_says_so(prefill, ask):
    with SpectrumClient(prefill.address) as client:
        assert client.is_serving()
    with pytest.raises(errors.FailedPreconditionError, match=f"this client of {prefill.address} is closed; make"):
        ask(client)


def test_arguments_of_another_type(client):
    with pytest.raises(errors.InvalidArgumentError, match="the server's address is None; allowed: a text"):
        SpectrumClient(None)
    with pytest.raises(errors.InvalidArgumentError, match=r"TokenIds\(\(1, 2, 3\)\)"):
        client.generate([1, 2, 3])
    with pytest.raises(errors.InvalidArgumentError, match="timeout is '5'; allowed: a number"):
        client.generate("x", timeout="5")


def test_generate_at_a_server_that_is_no_prefill_service(decode_address):
    with SpectrumClient(decode_address) as client:
        said = f"{decode_address} is no prefill service of this release, perhaps a decode service"
        with pytest.raises(errors.FailedPreconditionError, match=said):
            client.generate("x").result()


def test_server_info_of_a_stranger():
    server = Server(lambda servicer, server: None, None, "stranger", threads=1, count_ended=lambda code: None)
    with (
        serving(server) as address,
        SpectrumClient(address) as client,
        pytest.raises(errors.NotFoundError, match="neither"),
    ):
        client.server_info()


def test_importing_the_client_loads_no_heavy_library():
    code = (
        "import sys, spectrumkv.client\n"
        "heavy = {'torch', 'transformers', 'numba', 'triton', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("timeout", [math.nan, 0, 0.0, -1, -math.inf, 9e9])
def test_a_timeout_that_is_no_time_is_refused(client, timeout):
    calls = (
        lambda: client.generate("x", timeout=timeout),
        lambda: client.server_info(timeout),
        lambda: client.is_serving(timeout),
        lambda: client.wait_until_serving(timeout),
    )
    for call in calls:
        with pytest.raises(errors.InvalidArgumentError, match=r"timeout is .*; allowed: seconds above 0"):
            call()


@pytest.mark.parametrize("timeout", [math.inf, 1e9])
def test_a_timeout_without_end_is_one(client, timeout):
    assert client.generate("x", timeout=timeout).result().tokens
    assert client.server_info(timeout).version
    assert client.is_serving(timeout)
    client.wait_until_serving(timeout)


def test_a_limit_of_the_servers_is_told_in_its_own_words(prefill, client):
    def answer(request, context):
        yield token(0, "a")
        raise errors.DeadlineExceededError("the longest that this server allows")

    prefill.answer = answer
    with pytest.raises(errors.DeadlineExceededError, match="the longest that this server allows"):
        client.generate("x", timeout=math.inf).result()
