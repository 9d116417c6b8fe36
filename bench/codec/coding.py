"""What coding a real prompt's KV costs beside computing the prompt, in time and in processor time."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.methods.wire_method import WireMethod
from spectrumkv.common.concurrency.threads import use_one_thread
from spectrumkv.prefill_server.tuning.needle.prompt import needle_prompt
from spectrumkv.prefill_server.tuning.replay import CapturedPrompt

OnStep = Callable[[str], object]


@dataclass
class Durations:
    """How long one thing took, round by round.

    Attributes:
        seconds: on the clock.
        processor_seconds: of all cores.
    """

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    def add(self, work: Callable[[], Any]) -> Any:
        """Do it, time it, and return what it returns."""
        started, processor_started = time.perf_counter(), time.process_time()
        result = work()
        self.seconds.append(time.perf_counter() - started)
        self.processor_seconds.append(time.process_time() - processor_started)
        return result

    @property
    def medians(self) -> tuple[float, float]:
        """Of both, the first round left out, which warms up."""
        return statistics.median(self.seconds[1:]), statistics.median(self.processor_seconds[1:])


@dataclass
class Coding:
    """A method, and how long it took to encode and to decode."""

    method: WireMethod
    encode: Durations = field(default_factory=Durations)
    decode: Durations = field(default_factory=Durations)


def measure(
    served: ServedModel, methods: Sequence[WireMethod], tokens: int, rounds: int, on_step: OnStep
) -> list[dict[str, Any]]:
    """Compute one prompt and code its KV by every method, in turn, again and again.

    Args:
        served: the model.
        methods: at least one.
        tokens: of the prompt, at most.
        rounds: rounds that count; one before them does not.
        on_step: told in words what was done.

    Returns:
        A row for each method.

    Raises:
        SpectrumKVError: the prompt does not fit the haystack, or a method cannot code the KV.
    """
    prompt = needle_prompt(served.loaded.tokenizer, tokens, depth=0.5, needle_index=0)
    prefill, codings = Durations(), [Coding(method) for method in methods]
    # As in the services, the model has all cores and what codes has one.
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
