"""Measure how fast a KV cache gets from one process into the pool of another, against its FP16 bytes over TCP."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from spectrumkv.bench.models.synthetic_prompt import SyntheticCache
from spectrumkv.bench.timing import interleaved_medians
from spectrumkv.bench.transfer.kv import KvSender, Sending, tiered
from spectrumkv.bench.transfer.raw import RawSender, TcpSender
from spectrumkv.bench.transfer.receiver import receiving_process
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.rpc.channel import open_channel
from spectrumkv.common.security import ChannelSecurity, TlsFiles
from spectrumkv.prefill_server.transfer.plan import KvPlan

TCP, GRPC, SPECTRUMKV = "raw-tcp-fp16", "grpc-fp16", "spectrumkv"
# Path without scoring and tiering: the tiers are known before the clock starts.
TIERED = "spectrumkv-tiered"
# Suffix of the paths over gRPC when they use mutual TLS.
MUTUAL_TLS = "-mutual-tls"


class _KvPath:
    """Send by a plan, and keep the measured transfers."""

    def __init__(self, sender: KvSender) -> None:
        self._sender = sender
        self.transfers: list[Sending] = []

    def __call__(self) -> float:
        sending = self._sender.send()
        self.transfers.append(sending)
        return sending.seconds


@dataclass(frozen=True)
class _ChannelPaths:
    """Hold the paths over one channel.

    Attributes:
        suffix: suffix of the paths' names; empty for plaintext.
        raw: sends FP16 bytes.
        kv: name, plan and path of each plan.
    """

    suffix: str
    raw: RawSender
    kv: list[tuple[str, KvPlan, _KvPath]]

    @property
    def operations(self) -> dict[tuple[str, int], Callable[[], float]]:
        """Return the timed operations by the path's name and the plan's number."""
        sends = {(name + self.suffix, number): path for number, (name, _, path) in enumerate(self.kv)}
        return {(GRPC + self.suffix, 0): self.raw.send, **sends}

    def rows(self, medians: Mapping[tuple[str, int], float], fp16_bytes: int) -> list[dict[str, Any]]:
        """Return a row for each path.

        Args:
            medians: median seconds of the operations.
            fp16_bytes: bytes of the cache at FP16.
        """
        rows = [_row(GRPC + self.suffix, medians[GRPC + self.suffix, 0], self.raw.message_bytes, fp16_bytes)]
        for number, (name, plan, path) in enumerate(self.kv):
            sent_bytes = path.transfers[-1].sent.message_bytes
            row = _row(name + self.suffix, medians[name + self.suffix, number], sent_bytes, fp16_bytes)
            # The first transfer warms up and does not count.
            encoding = statistics.median(one.sent.encode_seconds for one in path.transfers[1:])
            rows.append(row | _plan_columns(plan) | {"score_and_encode_seconds": encoding})
        return rows


def measure(
    cache: SyntheticCache,
    captures: list[LayerCapture],
    plans: Sequence[KvPlan],
    chunk_bytes: int,
    rounds: int,
    on_round: Callable[[str], None],
    tls: TlsFiles | None = None,
) -> list[dict[str, Any]]:
    """Send a cache to another process by every path in turn; return a row for each path.

    Raw TCP and gRPC start from the bytes of FP16 tensors and end with these bytes in the receiver's memory. Path
    `spectrumkv` starts from what the model's layers show and ends with verified KV in the pool, so its time includes
    scoring, tiering, encoding, checksums and decoding. Path `spectrumkv-tiered` knows the tiers, so its time includes
    only encoding, checksums and decoding.

    Args:
        cache: the cache that is sent.
        captures: what its layers show; see `layer_captures`.
        plans: how path `spectrumkv` sends it.
        chunk_bytes: payload of a message, in bytes, on all paths over gRPC.
        rounds: rounds that count.
        on_round: called after each round with a text that says which round it was.
        tls: certificate, key and authority of both ends; with them, the paths over gRPC run over mutual TLS too.

    Returns:
        A row for each path.
    """
    message = _fp16_bytes(cache)
    all_plans = [(SPECTRUMKV, plan) for plan in plans]
    all_plans += [(TIERED, tiered(plan, captures, cache.geometry)) for plan in plans if _has_tiers(plan)]
    securities = {"": ChannelSecurity()} | ({} if tls is None else {MUTUAL_TLS: ChannelSecurity(tls)})
    with ExitStack() as running:
        addresses = running.enter_context(receiving_process(cache.geometry, cache.tokens, tls))
        operations = {(TCP, 0): running.enter_context(TcpSender(addresses.tcp, message))}
        channels = []
        for suffix, security in securities.items():
            address = addresses.grpc_tls if suffix else addresses.grpc
            channel = running.enter_context(open_channel(str(address), security))
            senders = [KvSender(channel, captures, plan, cache, chunk_bytes) for _, plan in all_plans]
            for sender in senders:
                sender.put_basis()
            paths = [(name, plan, _KvPath(sender)) for (name, plan), sender in zip(all_plans, senders, strict=True)]
            channels.append(_ChannelPaths(suffix, RawSender(channel, message, chunk_bytes), paths))
            operations |= channels[-1].operations
        with torch.inference_mode():
            medians = interleaved_medians(operations, rounds, on_round)
    rows = [_row(TCP, medians[TCP, 0], len(message), len(message))]
    for one in channels:
        rows += one.rows(medians, len(message))
    for row in rows:
        row["ratio_to_raw_tcp"] = row["fp16_equivalent_gbps"] / rows[0]["fp16_equivalent_gbps"]
    _compare_with_plaintext(rows)
    return rows


def _has_tiers(plan: KvPlan) -> bool:
    """Return whether a plan's policy gives tokens tiers by their scores, so that scoring can be left out."""
    return plan.policy.needs_scores and plan.policy.budget_kind is BudgetKind.TIER_COST


def _compare_with_plaintext(rows: list[dict[str, Any]]) -> None:
    """Add to each row over mutual TLS its speed divided by that over plaintext."""
    plaintext = {_contender(row): row["fp16_equivalent_gbps"] for row in rows if MUTUAL_TLS not in row["path"]}
    for row in rows:
        if MUTUAL_TLS in row["path"]:
            row["ratio_to_plaintext"] = row["fp16_equivalent_gbps"] / plaintext[_contender(row)]


def _contender(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["path"].removesuffix(MUTUAL_TLS), row["policy"], row["budget_target"], row["codec"])


def _fp16_bytes(cache: SyntheticCache) -> memoryview:
    """Return the whole cache at 16 bits an element, in one contiguous buffer."""
    half = cache.geometry.half_dtype
    states = torch.stack([torch.stack(pair) for pair in zip(cache.keys, cache.values, strict=True)]).to(half)
    return states.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _row(path: str, seconds: float, sent_bytes: int, fp16_bytes: int) -> dict[str, Any]:
    return {
        "path": path,
        "policy": None,
        "budget_target": None,
        "scorer": None,
        "codec": None,
        "budget_counted": sent_bytes / fp16_bytes,
        "fp16_equivalent_gbps": fp16_bytes / seconds / 1e9,
        "ratio_to_raw_tcp": None,
        "ratio_to_plaintext": None,
        "seconds": seconds,
        "score_and_encode_seconds": None,
    }


def _plan_columns(plan: KvPlan) -> dict[str, Any]:
    return {
        "policy": plan.policy.name,
        "budget_target": plan.budget.value,
        "scorer": plan.scorer if plan.policy.needs_scores else None,
        "codec": plan.codec.name,
    }
