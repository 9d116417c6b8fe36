"""Measure what encoding and decoding a real prompt's KV takes beside computing the prompt, in two kinds of time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.methods.wire_method import WireMethod
from spectrumkv.bench.timing import Durations
from spectrumkv.common.concurrency.threads import use_one_thread
from spectrumkv.prefill_server.tuning.needle.prompt import needle_prompt
from spectrumkv.prefill_server.tuning.replay import CapturedPrompt

OnStep = Callable[[str], object]


@dataclass
class Coding:
    """Hold a method, and how long it took to encode and to decode."""

    method: WireMethod
    encode: Durations = field(default_factory=Durations)
    decode: Durations = field(default_factory=Durations)


def measure(
    served: ServedModel, methods: Sequence[WireMethod], tokens: int, rounds: int, on_step: OnStep
) -> list[dict[str, Any]]:
    """Compute one prompt, and encode and decode its KV by every method, in turn, in every round.

    Args:
        served: the model.
        methods: at least one.
        tokens: largest number of tokens of the prompt.
        rounds: rounds that count; one round before them warms up.
        on_step: called after each round with a text that says which round it was.

    Returns:
        A row for each method.

    Raises:
        SpectrumKVError: the prompt does not fit the haystack, or a method cannot code the KV.
    """
    prompt = needle_prompt(served.loaded.tokenizer, tokens, depth=0.5, needle_index=0)
    prefill, codings = Durations(), [Coding(method) for method in methods]
    # As in the services, the model runs on all cores and the codec on one.
    cores = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=use_one_thread) as coder:
        for number in range(rounds + 1):
            captured = prefill.add(lambda: served.prefill(prompt.token_ids)).captured
            for coding in codings:
                coder.submit(_code, served, captured, coding).result()
            on_step(f"round {number} of {rounds}")
    torch.set_num_threads(cores)
    return [_row(coding, prefill, len(prompt.token_ids)) for coding in codings]


@torch.inference_mode()
def _code(served: ServedModel, captured: CapturedPrompt, coding: Coding) -> None:
    plan, geometry = coding.method.plan, served.loaded.geometry
    segments = coding.encode.add(lambda: list(captured.segments(plan, geometry)))
    decoder = plan.decoder(geometry)
    states = torch.empty(2, *captured.layers[0].keys.shape, dtype=geometry.native_dtype, device=served.loaded.device)

    def decode() -> None:
        for segment in segments:
            span = slice(segment.first_token, segment.first_token + segment.tiers.numel())
            decoder.decode(segment, states[0, :, span], states[1, :, span])

    coding.decode.add(decode)


def _row(coding: Coding, prefill: Durations, tokens: int) -> dict[str, Any]:
    (prefill_seconds, prefill_processor), (encode_seconds, encode_processor), (decode_seconds, decode_processor) = (
        one.medians for one in (prefill, coding.encode, coding.decode)
    )
    return {
        "policy": coding.method.policy,
        "codec": coding.method.codec,
        "budget_target": coding.method.budget,
        "scorer": coding.method.scorer,
        "scope": coding.method.scope,
        "prompt_tokens": tokens,
        "prefill_seconds": prefill_seconds,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "share_of_prefill": (encode_seconds + decode_seconds) / prefill_seconds,
        "prefill_processor_seconds": prefill_processor,
        "encode_processor_seconds": encode_processor,
        "decode_processor_seconds": decode_processor,
        "processor_share_of_prefill": (encode_processor + decode_processor) / prefill_processor,
    }
