"""Measure hand-offs over links of known bandwidth: how much of a transfer delays the second token."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spectrumkv.bench.link.network import shaped_link
from spectrumkv.bench.link.requests import Errand, Setting
from spectrumkv.bench.link.services import DECODE, PREFILL, PREFILL_METRICS, linked_services
from spectrumkv.client.local.running_pair import READY_TIMEOUT_SECONDS
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.spectral.codec import SpectralCodec

SEQUENTIAL = "fp16 without overlap"
SETTINGS = (
    Setting(SEQUENTIAL, "fp16", None, "model"),
    Setting("fp16", "fp16", None, "layer"),
    Setting("0.5", SpectralCodec.name, 0.5, "layer"),
    Setting("0.3", SpectralCodec.name, 0.3, "layer"),
)
# Bytes of TCP payload (with timestamps, at an MTU of 1500) in an Ethernet frame, and of the frame. The shaper counts
# frames.
SEGMENT_BYTES, FRAME_BYTES = 1448, 1514
# The wire time starts when this share of the KV's bytes has left, because Begin leaves long before the KV.
WIRE_STARTS_SHARE = 0.01


def measure(
    megabits: Sequence[float],
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    options: Mapping[str, str],
    on_rate: Callable[[str], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Send the same prompt over a link of each bandwidth at every setting, in turn.

    Args:
        megabits: bandwidths in 10^6 bits per second.
        prompt_tokens: length of the prompt.
        output_tokens: tokens to generate, 3 or more, so that at least one gap follows the hand-off.
        rounds: rounds at each bandwidth.
        options: options of the services.
        on_rate: called after each bandwidth with a text that names it.

    Returns:
        The served model's description, and a row for each bandwidth and setting.

    Raises:
        InvalidArgumentError: a number is out of its range.
        SpectrumKVError: the link cannot be made, or a service or a request failed.
    """
    for name, value, least in (
        ("--random-input-len", prompt_tokens, 1),
        ("--random-output-len", output_tokens, 3),
        ("--rounds", rounds, 1),
    ):
        if value < least:
            raise InvalidArgumentError(f"{name} is {value}; allowed: {least} or more")
    errand = Errand(
        server=str(PREFILL),
        decode=str(DECODE),
        metrics=str(PREFILL_METRICS),
        ready_seconds=READY_TIMEOUT_SECONDS,
        settings=SETTINGS,
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=0,
    )
    model: dict[str, Any] = {}
    rows = []
    with shaped_link() as link, linked_services(link, options) as services:
        for rate in megabits:
            link.shape(rate * 1e6)
            result = services.run(errand)
            model = result["model"]
            rows += rate_rows(rate, prompt_tokens, result["observed"])
            on_rate(f"{rate:g} Mb/s")
    return model, rows


def rate_rows(megabits: float, prompt_tokens: int, observed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each setting at one bandwidth, by medians over its requests.

    Args:
        megabits: the bandwidth.
        prompt_tokens: length of the prompt.
        observed: `requests.Observed` as JSON, of all settings.
    """
    rows = [
        _row(megabits, prompt_tokens, setting, [one for one in observed if one["setting"] == setting.name])
        for setting in SETTINGS
    ]
    sequential = next(row for row in rows if row["setting"] == SEQUENTIAL)
    for row in rows:
        row["handoff_ratio_to_sequential"] = row["handoff_ms"] / sequential["handoff_ms"]
    return rows


def timeline(observed: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return when each stage of a request began and ended, in seconds after it was sent.

    Args:
        observed: `requests.Observed` as JSON.

    Returns:
        "prefill" (until the first token), "wire" (KV on the link), "handoff" (first to second token), "decode".
    """
    first, second, *_ = observed["arrivals"]
    size = observed["kv_bytes_sent"]
    begun = [moment for moment, sent in observed["wire"] if sent >= WIRE_STARTS_SHARE * size]
    done = [moment for moment, sent in observed["wire"] if sent >= size]
    starts = begun[0] if begun else second
    return {
        "prefill": (0.0, first),
        # Where the last sample came before the last byte, the second token came soon after it.
        "wire": (starts, done[0] if done else second),
        "handoff": (first, second),
        "decode": (second, observed["ended"]),
    }


def _row(
    megabits: float, prompt_tokens: int, setting: Setting, observed: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    gaps = [
        later - earlier
        for one in observed
        for earlier, later in zip(one["arrivals"][1:-1], one["arrivals"][2:], strict=True)
    ]
    itl_ms = statistics.median(gaps) * 1000.0
    requests = [_request(one, megabits, itl_ms) for one in observed]
    medians = {name: statistics.median(one[name] for one in requests) for name in requests[0]}
    # The request with the median hand-off (the lower of two).
    typical = sorted(observed, key=_handoff_seconds)[(len(observed) - 1) // 2]
    return {
        "rate_mbps": megabits,
        "setting": setting.name,
        "policy": setting.policy,
        "budget_target": setting.budget,
        "scope": setting.scope,
        "codecs": sorted({one["codec"] for one in observed}),
        "prompt_tokens": prompt_tokens,
        "kv_sent_bytes": typical["kv_bytes_sent"],
        "budget_counted": typical["budget_counted"],
        "itl_ms": itl_ms,
        **medians,
        "handoff_ratio_to_sequential": None,
        "timeline": timeline(typical),
        "requests": requests,
    }


def _request(observed: Mapping[str, Any], megabits: float, itl_ms: float) -> dict[str, float]:
    """Return the times of a request and the floor of its hand-off: the wire time after its prefill, and one ITL."""
    handoff_ms = _handoff_seconds(observed) * 1000.0
    stages = {f"{name}_ms": observed["stages"][name] * 1000.0 for name in ("prefill", "encode", "transfer")}
    payload_ms = observed["kv_bytes_sent"] * 8 / (megabits * 1e6) * 1000.0
    wire_ms = payload_ms * FRAME_BYTES / SEGMENT_BYTES
    floor_ms = max(0.0, wire_ms - stages["prefill_ms"]) + itl_ms
    return {
        "ttft_ms": observed["arrivals"][0] * 1000.0,
        "handoff_ms": handoff_ms,
        **stages,
        "payload_ms": payload_ms,
        "wire_ms": wire_ms,
        "handoff_floor_ms": floor_ms,
        "handoff_floor_ratio": handoff_ms / floor_ms,
    }


def _handoff_seconds(observed: Mapping[str, Any]) -> float:
    return float(observed["arrivals"][1] - observed["arrivals"][0])
