"""Requests whose deadlines are shorter than the basis's upload are answered while it goes on (docs/faults.md)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spectrumkv.client.completion import Usage
from spectrumkv.client.request import KvChoice, Sampling
from tests.faults import sabotage
from tests.faults.deployment import until
from tests.faults.fleet import running_fleet
from tests.faults.incubator import Incubator
from tests.faults.requests import prompt
from tests.tiny_models import tiny_model

REQUESTS, DEADLINE_SECONDS = 24, 8.0
SPECTRAL = KvChoice(policy="spectral", budget=0.4)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_deadlines_shorter_than_an_upload_are_met_after_a_restart_of_decode(
    tmp_path: Path, incubator: Incubator
) -> None:
    with (
        running_fleet(tmp_path, tiny_model("llama"), incubator, size=1, kv_memory="64MiB") as fleet,
        fleet.client() as client,
    ):

        def ask(_: int) -> Usage:
            sampling = Sampling(max_tokens=2, ignore_eos=True)
            stream = client.generate(prompt(60), sampling=sampling, kv=SPECTRAL, timeout=DEADLINE_SECONDS)
            return stream.result().usage

        (decode,), (prefill,) = fleet.decodes, fleet.prefills
        until(lambda: ask(0).codec == "spectral", 60, "decode has the basis")
        decode.kill()
        decode.sabotage(sabotage.SLOW_UPLOAD)
        decode.start()
        decode.wait_until_serving()
        until(lambda: prefill.metrics()["decode_worker_accepting"] == 1, 30, "prefill finds its worker")
        with ThreadPoolExecutor(REQUESTS) as clients:
            answers = list(clients.map(ask, range(REQUESTS)))
        assert {answer.codec for answer in answers} == {"absmax"}
        assert {answer.codec_reason for answer in answers} == {
            f"{decode.address} has not received the codec's basis yet"
        }
        decode.switch.unlink()
        until(lambda: ask(0).codec == "spectral", 30, "the upload comes to its end")
