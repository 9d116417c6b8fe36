"""Fifty callers that ask a real pair for long answers and take no byte of them, while an honest client asks."""

import time
from collections.abc import Iterator

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import RunningPair, running_pair
from spectrumkv.client.request import Request, Sampling
from spectrumkv.common.rpc.limits.stalled_readers import STALL_SECONDS
from tests.faults.connections.asking import PROMPT, median_of
from tests.faults.connections.silent_streams import silent_connections
from tests.faults.deployment import NOTHING, Held, until
from tests.faults.report import tell
from tests.tiny_models import tiny_model

GENERATE = "/spectrumkv.v1.PrefillService/Generate"
CONNECTIONS, READERS, REQUESTS = 10, 50, 20
CANCELLED = "1"
# The watch looks now and then, and each service frees what it held.
ENDED_SECONDS = 15.0


@pytest.fixture(scope="module")
def pair() -> Iterator[RunningPair]:
    """A pair with places for all of them and some more, in the running batch, too."""
    options = {"model": str(tiny_model("llama")), "int4": "on", "kv_memory": "256MiB", "max_running": "64"}
    with running_pair({**options, **FREE_PORTS}) as one:
        yield one


def long_question() -> bytes:
    """A request as gRPC frames it: not compressed, and how many bytes follow."""
    message = (
        Request(prompt=PROMPT, sampling=Sampling(max_tokens=1000, ignore_eos=True)).to_proto().SerializeToString()
    )
    return b"\0" + len(message).to_bytes(4, "big") + message


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_callers_that_take_no_byte_lose_their_places_and_hold_up_nobody(
    pair: RunningPair, capsys: pytest.CaptureFixture[str]
) -> None:
    with SpectrumClient(pair.address) as client:
        quiet = median_of(client, REQUESTS)
        with silent_connections(pair.address, CONNECTIONS, window=0) as connections:
            asked = time.monotonic()
            for number in range(READERS):
                connections[number % CONNECTIONS].open(GENERATE, long_question(), ends=True)
            until(lambda: Held.by(pair.prefill.metrics_address).requests == READERS, 10.0, "all are in prefill")
            beside = median_of(client, REQUESTS)
            codes = [
                one.ended.get(timeout=STALL_SECONDS + ENDED_SECONDS)
                for one in connections
                for _ in range(READERS // CONNECTIONS)
            ]
            for launch in (pair.prefill, pair.decode):
                until(
                    lambda at=launch.metrics_address: Held.by(at) == NOTHING, ENDED_SECONDS, f"{launch.name} is free"
                )
            ended = time.monotonic() - asked
        after = median_of(client, REQUESTS)
    tell(
        capsys,
        f"{quiet * 1e3:.0f} ms on a quiet day, {beside * 1e3:.0f} ms beside {READERS} callers that take nothing, "
        f"{after * 1e3:.0f} ms once those were ended, after {ended:.0f} s",
    )
    assert codes == [CANCELLED] * READERS
    assert STALL_SECONDS - 5.0 < ended < STALL_SECONDS + ENDED_SECONDS
