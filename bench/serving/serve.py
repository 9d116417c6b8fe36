"""Offer the same requests to the two services and to one process, in turn, in one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from spectrumkv.bench.serving.load import Answer, LoadResult, System, Workload, offer
from spectrumkv.bench.serving.metrics import Goodput, add_ratios_to_baseline, metrics_row
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling, TokenIds

SPECTRUMKV, AGGREGATED = "spectrumkv", "aggregated"


class SpectrumSystem:
    """Serve requests by a running pair of services; see `System`.

    Args:
        client: connected to the prefill service.
        kv: how the KV cache is sent.
    """

    def __init__(self, client: SpectrumClient, kv: KvChoice) -> None:
        self._client = client
        self._kv = kv

    def complete(self, token_ids: Sequence[int], output_tokens: int) -> Answer:
        """Return the tokens and the times of their arrival; see `System.complete`."""
        sampling = Sampling(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        completion = self._client.generate(TokenIds(tuple(token_ids)), sampling=sampling, kv=self._kv).result()
        return Answer(
            arrivals=tuple(token.arrived_seconds for token in completion.tokens),
            ended=completion.finished.arrived_seconds,
            kv_bytes_sent=completion.usage.kv_bytes_sent,
            kv_fp16_bytes=completion.usage.kv_fp16_bytes,
            token_ids=completion.token_ids,
        )


@dataclass(frozen=True)
class Contender:
    """Name a system in rows.

    Attributes:
        columns: `system` and the other columns that identify its row.
        system: the system.
    """

    columns: dict[str, Any]
    system: System


def spectrum_contender(client: SpectrumClient, kv: KvChoice) -> Contender:
    """Return the pair, which sends its KV as `kv` says."""
    columns = {
        "system": SPECTRUMKV,
        "policy": kv.policy,
        "budget_target": kv.budget,
        "scorer": kv.scorer,
        "codec": kv.codec,
        "scope": kv.scope,
    }
    return Contender(columns, SpectrumSystem(client, kv))


def aggregated_contender(system: System) -> Contender:
    """Return the one process, which sends no KV."""
    columns = dict.fromkeys(("policy", "budget_target", "scorer", "codec", "scope"))
    return Contender({"system": AGGREGATED} | columns, system)


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    rounds: int,
    goodput: Goodput,
    on_request: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Offer the workload to each contender in turn, in every round; return a row for each.

    While one serves, the others are idle. Before the first round each serves one request, which does not count.

    Args:
        workload: the requests of one round.
        contenders: the systems.
        rounds: number of rounds.
        goodput: bounds of a good request.
        on_request: called after each request that counts with a text that says which it was.

    Returns:
        A row for each contender.
    """
    for contender in contenders:
        contender.system.complete(workload.prompts[0], workload.output_tokens)
    results: list[list[LoadResult]] = [[] for _ in contenders]
    for number in range(rounds):
        for contender, mine in zip(contenders, results, strict=True):
            done = f"{_label(contender)}, round {number + 1} of {rounds}"
            mine.append(offer(workload, contender.system, partial(on_request, done)))
    rows = [
        contender.columns | metrics_row(mine, goodput) for contender, mine in zip(contenders, results, strict=True)
    ]
    add_ratios_to_baseline(rows, AGGREGATED)
    return rows


def _label(contender: Contender) -> str:
    return " ".join(str(one) for one in contender.columns.values() if one is not None)
