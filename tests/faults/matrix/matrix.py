"""One fault in one phase: who is told what, how soon, and that nothing is left behind (docs/faults.md)."""

import contextlib
import time
from typing import Any

from spectrumkv.common.errors import SpectrumKVError
from tests.faults.deployment import DECODE_SLOTS, NOTHING, SMALL_SLOTS, Deployment, until
from tests.faults.matrix.kinds import SILENCE, Fault
from tests.faults.matrix.phases import PHASES, Stage
from tests.faults.requests import RequestInProcess, RunningRequest

BYSTANDER_PROMPT, BYSTANDER_TOKENS = 8, 9000
# Tokens that a bystander still gets after the fault.
TOKENS_AFTER = 3
# A scrape that began in time may end a little late.
SCRAPE_GRACE_SECONDS = 0.1
# A frozen process that goes on has its engine's step and its connections to see to first.
RECOVERED_SECONDS = 10.0


def reference_of(deployment: Deployment) -> list[int]:
    """What a bystander gets when nothing goes wrong."""
    request = send(deployment, deployment.other_prefill.address, BYSTANDER_PROMPT, 400)
    request.wait_for_end(60)
    assert request.error is None
    request.close()
    return request.token_ids


def inject(
    deployment: Deployment,
    reference: list[int],
    fault: Fault,
    phase: str,
) -> float:
    """Bring a request into a phase, do the damage, and check all that must follow.

    Args:
        deployment: whole and quiet, as it is afterwards.
        reference: what a bystander gets when nothing goes wrong.
        fault: what happens.
        phase: when, as in `PHASES`.

    Returns:
        After how many seconds the client was told.
    """
    make_ready(deployment)
    with contextlib.ExitStack() as cleanup:
        bystander = start_bystander(deployment, fault, cleanup)
        stage = Stage(deployment, starter(deployment, fault, cleanup))
        cleanup.callback(lambda: [request.close() for request in stage.company])
        cleanup.callback(fault.recover, deployment)
        cleanup.callback(deployment.back.release)
        with PHASES[phase](stage) as victim:
            struck_at = time.monotonic()
            fault.strike(deployment, victim)
            if fault.status == "DEADLINE_EXCEEDED":
                struck_at = victim.sent_at + fault.timeout
            told_after = client_is_told_after(fault, victim, struck_at)
            assert_released(deployment, fault, stage, struck_at)
            bystander.wait_for_tokens(min(bystander.tokens + TOKENS_AFTER, BYSTANDER_TOKENS))
        common = min(bystander.tokens, len(reference))
        assert bystander.error is None
        assert bystander.token_ids[:common] == reference[:common]
    for service in deployment.services:
        until(lambda service=service: service.held() == NOTHING, RECOVERED_SECONDS, f"{service.name} holds nothing")
    return told_after


def send(deployment: Deployment, address: object, prompt_tokens: int, max_tokens: int) -> RunningRequest:
    return RunningRequest(str(address), prompt_tokens, max_tokens, security=deployment.security)


def starter(deployment: Deployment, fault: Fault, cleanup: contextlib.ExitStack) -> Any:
    def start(prompt_tokens: int, max_tokens: int) -> Any:
        address = deployment.front.address
        victim: Any
        if fault.client_process:
            victim = RequestInProcess(address, prompt_tokens, max_tokens, deployment.security)
        else:
            victim = RunningRequest(address, prompt_tokens, max_tokens, fault.timeout, deployment.security)
        cleanup.callback(victim.close)
        return victim

    return start


def client_is_told_after(fault: Fault, victim: Any, struck_at: float) -> float:
    """Check what the client is told, and return how many seconds that took."""
    if fault.status is None:
        return 0.0
    victim.wait_for_end(fault.seconds + 1)
    assert isinstance(victim.error, SpectrumKVError)
    assert victim.error.code == fault.status, victim.error.message
    seconds = float(victim.ended_at - struck_at)
    assert seconds <= fault.seconds
    return seconds


def assert_released(deployment: Deployment, fault: Fault, stage: Stage, struck_at: float) -> None:
    """Both sides hold no more than they do for others."""
    for name in ("prefill", "decode"):
        if name != fault.unheard:
            left = max(struck_at + fault.seconds - time.monotonic(), 0.0) + SCRAPE_GRACE_SECONDS
            until(lambda name=name: stage.is_released(name), left, f"{name} is free again")


def start_bystander(deployment: Deployment, fault: Fault, cleanup: contextlib.ExitStack) -> RunningRequest:
    """A request that the fault does not concern, with tokens coming."""
    if fault.bystander == "decode":
        request = send(deployment, deployment.other_prefill.address, BYSTANDER_PROMPT, BYSTANDER_TOKENS)
        cleanup.callback(request.close)
        request.wait_for_tokens(2)
        return request
    with contextlib.ExitStack() as allocations:
        # Prefill sends to the worker with the most free slots: for a moment that is the small one.
        for _ in range(3):
            large = send(deployment, deployment.other_prefill.address, BYSTANDER_PROMPT, DECODE_SLOTS * 2 // 7)
            allocations.callback(large.close)
            large.wait_for_tokens(1)
        prefill = deployment.prefill
        until(lambda: prefill.metrics()["decode_worker_slots_free"] < 2 * SMALL_SLOTS, 10, "prefill hears of it")
        request = send(deployment, deployment.prefill.address, BYSTANDER_PROMPT, BYSTANDER_TOKENS)
        cleanup.callback(request.close)
        request.wait_for_tokens(2)
        assert deployment.small_decode.held().resident_bytes
    until(lambda: deployment.decode.held() == NOTHING, RECOVERED_SECONDS, "the large one is free again")
    return request


def make_ready(deployment: Deployment) -> None:
    """Wait until a request gets through on the whole way, and all is quiet again."""

    def served() -> bool:
        request = send(deployment, deployment.front.address, 4, SMALL_SLOTS + 500)
        try:
            request.wait_for_tokens(2, SILENCE)
        except AssertionError:
            return False
        finally:
            request.close()
        return True

    until(served, 30.0, "a request gets through")
    # A worker that was killed is found again by each prefill in its own time.
    for service, workers in ((deployment.prefill, 2), (deployment.other_prefill, 1)):
        until(
            lambda service=service, workers=workers: service.metrics()["decode_worker_accepting"] == workers,
            30.0,
            "prefill finds its workers again",
        )
    for service in deployment.services:
        until(lambda service=service: service.held() == NOTHING, RECOVERED_SECONDS, f"{service.name} is quiet")
