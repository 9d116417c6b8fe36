"""Brings a request into a phase and keeps it there until the test has done its damage."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.faults.deployment import PLACES, SMALL_SLOTS, Deployment, Held, until
from tests.faults.link import TOWARDS_CLIENT, TOWARDS_SERVER
from tests.faults.requests import RunningRequest

PLACE_SECONDS = 60.0
SHORT_PROMPT, MIDDLE_PROMPT, LONG_PROMPT = 200, 3000, 12_000
# Where the gate closes in a KV cache of 3000 tokens, which is 4.6 MB at FP16.
MID_TRANSFER_BYTES = 1 << 20

Start = Callable[[int, int], Any]


def completion_for(prompt_tokens: int) -> int:
    """As many tokens as make a request too large for the small decode worker."""
    return max(SMALL_SLOTS - prompt_tokens + 500, 2000)


@dataclass
class Stage:
    """One test's requests.

    Attributes:
        deployment: where they run.
        start: sends the request that the fault happens to.
        others: what each service holds for everybody else.
        company: requests that are there only to make the phase what it is.
    """

    deployment: Deployment
    start: Start
    others: dict[str, Held] = field(default_factory=dict)
    company: list[RunningRequest] = field(default_factory=list)

    def send(self, prompt_tokens: int) -> Any:
        """Send the request, once it is known what the others hold."""
        for name in ("prefill", "decode"):
            self.others[name] = getattr(self.deployment, name).held()
        return self.start(prompt_tokens, completion_for(prompt_tokens))

    def keep_company(self, address: str, prompt_tokens: int) -> RunningRequest:
        request = RunningRequest(
            address, prompt_tokens, completion_for(prompt_tokens), security=self.deployment.security
        )
        self.company.append(request)
        return request

    def is_released(self, name: str) -> bool:
        """Whether a service holds no more than for others: requests on prefill, slots on decode.

        The others may go on to their own next phases, so that prefill's bytes and decode's requests say nothing.
        """
        held, others = getattr(self.deployment, name).held(), self.others[name]
        if name == "prefill":
            return bool(held.requests <= others.requests)
        return bool(held.resident_bytes <= others.resident_bytes and held.slots_used <= others.slots_used)

    def decode_holds_more(self) -> bool:
        return self.deployment.decode.held().resident_bytes > self.others["decode"].resident_bytes


@contextlib.contextmanager
def queued(stage: Stage) -> Iterator[Any]:
    """Slots are reserved; the prompt waits for its turn on prefill's engine."""
    blocker = stage.keep_company(stage.deployment.prefill_address, LONG_PROMPT)
    prefill = stage.deployment.prefill
    until(lambda: prefill.metrics()["kv_tokens_total"] > 0 and is_computing(stage), PLACE_SECONDS, "a prompt runs")
    victim = stage.send(SHORT_PROMPT)
    until(lambda: prefill.metrics()["requests_waiting"] == 1, PLACE_SECONDS, "the next one waits")
    until(stage.decode_holds_more, PLACE_SECONDS, "its slots are reserved")
    assert blocker.tokens == 0, "the prompt before it is through already"
    yield victim


@contextlib.contextmanager
def reserved(stage: Stage) -> Iterator[Any]:
    """Decode has reserved the slots; prefill does not know it yet."""
    stage.deployment.back.hold(TOWARDS_CLIENT)
    victim = stage.send(SHORT_PROMPT)
    until(stage.decode_holds_more, PLACE_SECONDS, "slots are reserved")
    yield victim


@contextlib.contextmanager
def prefilling(stage: Stage) -> Iterator[Any]:
    """The model runs the prompt; its first layer has left."""
    received = decode_received(stage)
    victim = stage.send(LONG_PROMPT)
    until(lambda: decode_received(stage) > received + (1 << 20), PLACE_SECONDS, "the first layer arrives")
    assert victim.tokens == 0
    yield victim


@contextlib.contextmanager
def transferring(stage: Stage) -> Iterator[Any]:
    """A part of the KV has arrived, the rest is on its way; the client has the first token."""
    received = decode_received(stage)
    stage.deployment.back.hold(TOWARDS_SERVER, MID_TRANSFER_BYTES)
    victim = stage.send(MIDDLE_PROMPT)
    victim.wait_for_tokens(1)
    stage.deployment.back.wait_until_held(TOWARDS_SERVER)
    until(lambda: decode_received(stage) > received + MID_TRANSFER_BYTES // 2, PLACE_SECONDS, "half has arrived")
    yield victim


@contextlib.contextmanager
def before_joining(stage: Stage) -> Iterator[Any]:
    """All KV has arrived; every place in decode's running batch is taken."""
    decode = stage.deployment.decode
    while decode.metrics()["requests_running"] < PLACES:
        stage.keep_company(str(stage.deployment.other_prefill.address), SHORT_PROMPT).wait_for_tokens(2)
    victim = stage.send(SHORT_PROMPT)
    victim.wait_for_tokens(1)
    until(lambda: decode.metrics()["requests_waiting"] == 1, PLACE_SECONDS, "it waits for a place")
    yield victim


@contextlib.contextmanager
def decoding(stage: Stage) -> Iterator[Any]:
    """Tokens come from decode."""
    victim = stage.send(SHORT_PROMPT)
    victim.wait_for_tokens(3)
    yield victim


PHASES = {
    "queued": queued,
    "reserved": reserved,
    "prefill": prefilling,
    "mid-transfer": transferring,
    "before joining": before_joining,
    "decoding": decoding,
}


def decode_received(stage: Stage) -> float:
    return stage.deployment.decode.metrics()["kv_bytes_received_total"]


def is_computing(stage: Stage) -> bool:
    """Whether the company's prompt has begun: its slots are reserved and nothing waits for the engine."""
    metrics = stage.deployment.prefill.metrics()
    holds = stage.deployment.decode.held().resident_bytes > 0
    return metrics["requests_running"] >= 1 and metrics["requests_waiting"] == 0 and holds
