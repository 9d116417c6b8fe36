"""A client that knows several prefill services: gRPC chooses, and one that is lost early costs no request."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.completion import Completion
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.errors import InvalidArgumentError, UnavailableError
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import ChannelSecurity, TlsFiles
from spectrumkv.common.service.options import Address
from spectrumkv.common.telemetry.metrics import Metrics
from tests.common.security.guarded import guarded
from tests.common.security.test_tls import serving_tls, trusting
from tests.faults.link import TOWARDS_CLIENT, Link, link_to
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import decode_server, prefill_server, sample, total

PROMPT = TokenIds(tuple(random_prompt(200)))
SAMPLING = Sampling(max_tokens=8, ignore_eos=True)


@dataclass(frozen=True)
class Prefills:
    """Two prefill services on one decode; the first behind a link that can break."""

    link: Link
    first: Metrics
    second: Metrics
    second_port: int

    def client(self) -> SpectrumClient:
        return SpectrumClient(f"{self.link.address},127.0.0.1:{self.second_port}")


@pytest.fixture
def prefills(tiny_directories: dict[str, Path]) -> Iterator[Prefills]:
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory="64MiB") as (_, _, decode_port),
        prefill_server(model, [decode_port]) as (_, first, first_port),
        prefill_server(model, [decode_port]) as (_, second, second_port),
        link_to(first_port) as link,
    ):
        yield Prefills(link, first, second, second_port)


def ask(client: SpectrumClient) -> Completion:
    return client.generate(PROMPT, sampling=SAMPLING, kv=KvChoice(policy="native"), timeout=60).result()


def served(metrics: Metrics) -> float:
    return sample(metrics, "requests_total", code="OK")


def until_both_serve(prefills: Prefills, client: SpectrumClient) -> None:
    """Until then gRPC may know one of them only."""
    deadline = time.monotonic() + 20
    while not (served(prefills.first) and served(prefills.second)):
        assert time.monotonic() < deadline
        ask(client)


def test_requests_go_to_both_and_get_the_same_answers(prefills: Prefills) -> None:
    with prefills.client() as client:
        until_both_serve(prefills, client)
        before = served(prefills.first), served(prefills.second)
        with ThreadPoolExecutor(4) as pool:
            answers = [one.result().token_ids for one in [pool.submit(ask, client) for _ in range(8)]]
        assert len(set(answers)) == 1
        assert served(prefills.first) - before[0] == served(prefills.second) - before[1] == 4


@pytest.mark.slow
def test_a_prefill_that_is_lost_before_the_first_token_costs_no_request(prefills: Prefills) -> None:
    with prefills.client() as client, ThreadPoolExecutor(4) as pool:
        until_both_serve(prefills, client)
        prefills.link.hold(TOWARDS_CLIENT)
        ended = total(prefills.first, "requests_total")
        running = [pool.submit(ask, client) for _ in range(4)]
        deadline = time.monotonic() + 20
        while total(prefills.first, "requests_total") < ended + 2:
            assert time.monotonic() < deadline, "nothing went to the first"
        prefills.link.reset()
        assert len({one.result().token_ids for one in running}) == 1


@pytest.mark.slow
def test_a_prefill_that_is_lost_later_is_told(prefills: Prefills) -> None:
    with prefills.client() as client:
        until_both_serve(prefills, client)
        streams = [
            client.generate(PROMPT, sampling=Sampling(max_tokens=1500, ignore_eos=True), timeout=60) for _ in range(2)
        ]
        for stream in streams:
            next(stream)
        prefills.link.reset()
        with pytest.raises(UnavailableError):
            [stream.result() for stream in streams]


def test_tls_verifies_each_by_the_one_name_they_share(tmp_path: Path) -> None:
    with guarded(serving_tls(tmp_path / "one")) as one, guarded(serving_tls(tmp_path / "two")) as two:
        with SpectrumClient(f"{one.address},{two.address}", trusting(tmp_path / "client")) as client:
            for _ in range(8):
                next(client.generate("a"))
        assert one.codes
        trust = trusting(tmp_path / "client")
        misnamed = ChannelSecurity(trust.tls, server_name="another.example")
        with SpectrumClient(f"{one.address},{two.address}", misnamed) as client, pytest.raises(UnavailableError):
            next(client.generate("a"))


def test_what_grpc_cannot_choose_among_is_refused_with_a_sentence() -> None:
    with pytest.raises(InvalidArgumentError, match="several numeric addresses"):
        SpectrumClient("prefill-1:50051,prefill-2:50051")
    with pytest.raises(InvalidArgumentError, match="several numeric addresses"):
        SpectrumClient("127.0.0.1:50051,[::1]:50051")
    with pytest.raises(InvalidArgumentError, match="HOST:PORT"):
        SpectrumClient("127.0.0.1:50051,")
    with pytest.raises(InvalidArgumentError, match="--tls-name"):
        SpectrumClient("10.0.0.1:50051,10.0.0.2:50051", ChannelSecurity(TlsFiles()))
    with pytest.raises(InvalidArgumentError, match="--allow-plaintext"):
        SpectrumClient("127.0.0.1:50051,10.0.0.2:50051")


def test_one_address_is_left_as_it_is() -> None:
    assert Target((Address("10.0.0.1", 50051),)).uri == "10.0.0.1:50051"
    assert Target((Address("10.0.0.1", 50051),)).options == ()
    assert Target.parse("[::1]:1, [::1]:2").uri == "ipv6:[::1]:1,[::1]:2"


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("prefill:50051", "dns:///prefill:50051"),
        ("dns:///prefill:50051", "dns:///prefill:50051"),
        ("dns:prefill:50051", "dns:///prefill:50051"),
        ("dns://10.0.0.2:53/prefill:50051", "dns://10.0.0.2:53/prefill:50051"),
    ],
)
def test_a_name_is_balanced_over_its_addresses(text: str, uri: str) -> None:
    target = Target.parse(text)
    assert target.uri == uri
    assert "round_robin" in dict(target.options)["grpc.service_config"]


@pytest.mark.parametrize(
    "text", ["dns:///prefill", "dns://x/prefill:1", "dns:///a/b:1", "dns://10.0.0.2:53/10.0.0.1:1"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Target.parse(text)


def test_localhost_of_a_name_server_may_be_any_machine() -> None:
    assert Target.parse("localhost:1").is_loopback
    assert not Target.parse("dns://10.0.0.2:53/localhost:1").is_loopback
