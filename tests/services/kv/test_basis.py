"""The spectral codec served: every worker has its basis, budgets are met, and a slow coder gives way."""

from dataclasses import replace
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.prefill_server import service
from spectrumkv.prefill_server.transfer.codec_selector import ENOUGH, CodecSelector, RunningMedian
from tests.services.kv.test_lossless import random_prompt
from tests.services.pair import decode_server, prefill_server, sample

SPECTRAL = KvChoice(policy="spectral", budget=0.4)


@pytest.mark.slow
def test_every_worker_is_sent_the_basis_once(tiny_directories: dict[str, Path]) -> None:
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory="64MiB") as (_, first, first_port),
        decode_server(model, kv_memory="64MiB") as (_, second, second_port),
        prefill_server(model, [first_port, second_port]) as (_, metrics, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        prompt, sampling = TokenIds(tuple(random_prompt(60))), Sampling(max_tokens=4, ignore_eos=True)
        answers = [client.generate(prompt, sampling=sampling, kv=SPECTRAL).result() for _ in range(6)]
        assert len({answer.usage.decode_worker for answer in answers}) == 2
        assert len({tuple(token.token_id for token in answer.tokens) for answer in answers}) == 1
        sent = sample(metrics, "kv_bytes_sent_total", tier="basis")
        received = [sample(one, "kv_bytes_received_total", tier="basis") for one in (first, second)]
        assert sent == sum(received)
        assert received[0] == received[1] > 0


def test_a_counted_budget_is_met_from_short_to_long_prompts(tiny_directories: dict[str, Path]) -> None:
    model = tiny_directories["llama"]
    with (
        decode_server(model, kv_memory="64MiB") as (_, _, decode_port),
        prefill_server(model, [decode_port]) as (_, _, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        for tokens in (64, 300, 1000):
            for budget in (0.15, 0.5, 1.0):
                usage = (
                    client.generate(
                        TokenIds(tuple(random_prompt(tokens))),
                        sampling=Sampling(max_tokens=2, ignore_eos=True),
                        kv=KvChoice(policy="spectral", budget=budget),
                    )
                    .result()
                    .usage
                )
                assert 0.98 * budget <= usage.budget_counted <= budget, (tokens, budget)
        # Too short for its budget: it is sent at the coarsest steps all the same, and what it took is told.
        usage = (
            client.generate(TokenIds((5,)), sampling=Sampling(max_tokens=2, ignore_eos=True), kv=KvChoice(budget=0.1))
            .result()
            .usage
        )
        assert usage.completion_tokens == 2
        assert usage.budget_counted > 0.1


def test_a_coder_that_would_hold_requests_up_gives_way_and_says_so(
    tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: list[CodecSelector] = []

    def made(geometry: KvGeometry, on_gpu: bool, kernels_code: bool) -> CodecSelector:
        choices.append(CodecSelector(geometry, on_gpu, kernels_code))
        return choices[-1]

    monkeypatch.setattr(service, "CodecSelector", made)
    model = tiny_directories["llama"]
    prompt, sampling = TokenIds(tuple(random_prompt(400))), Sampling(max_tokens=4, ignore_eos=True)
    with (
        decode_server(model, kv_memory="64MiB") as (_, _, decode_port),
        prefill_server(model, [decode_port]) as (_, metrics, port),
        SpectrumClient(f"127.0.0.1:{port}") as client,
    ):
        named = client.generate(
            prompt, sampling=sampling, kv=KvChoice(policy="spectral", budget=0.4, codec="fixed_rate")
        )
        assert (named.result().usage.codec, named.result().usage.codec_reason) == ("fixed_rate", "")
        # As if this machine's coder had taken a second for each token of earlier requests.
        for _ in range(ENOUGH):
            choices[0].coders.setdefault("spectral", RunningMedian()).add(1.0, 1)
            choices[0].prefill.add(0.001, 1)
            choices[0].links.setdefault(f"127.0.0.1:{decode_port}", RunningMedian()).add(0.0, 1)
        chosen = client.generate(prompt, sampling=sampling, kv=SPECTRAL).result()
        assert chosen.usage.codec == "fixed_rate"
        assert chosen.usage.codec_reason.startswith(
            "coding would take 400.00 s, longer than computing the prompt (0.40 s)"
        )
        assert 0.98 * 0.4 <= chosen.usage.budget_counted <= 0.4
        assert chosen.token_ids == named.result().token_ids
        kept = client.generate(prompt, sampling=sampling, kv=replace(SPECTRAL, codec="spectral")).result()
        assert kept.usage.codec == "spectral"
        assert sample(metrics, "kv_codec_total", codec="fixed_rate") == 2
