"""What can go wrong, and what the client is told."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.rpc.channel import KEEPALIVE_SECONDS, KEEPALIVE_TIMEOUT_SECONDS
from spectrumkv.common.service.serving import EXIT_BROKEN
from spectrumkv.decode_server.engine import FAILED_STEPS
from tests.faults import sabotage
from tests.faults.deployment import Deployment
from tests.faults.requests import RunningRequest

PROMPTLY = 1.0
# What nobody can tell from silence is noticed when a ping goes unanswered.
SILENCE = KEEPALIVE_SECONDS + KEEPALIVE_TIMEOUT_SECONDS + PROMPTLY


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: as docs/faults.md has it.
        strike: does it, to the deployment and the request; it may wait for the deadline.
        status: what the client is told; None where it is not there any more.
        seconds: within which everybody knows.
        unheard: services that cannot know or cannot be asked: dead, frozen, or none.
        bystander: "prefill": a request through the same prefill to the other decode worker goes on; "decode": one
            from another prefill on the same decode worker does.
        recover: makes the deployment whole again.
        timeout: the request's own deadline, in seconds.
        client_process: the request comes from a process of its own.
    """

    name: str
    strike: Callable[[Deployment, Any], None]
    status: str | None = "UNAVAILABLE"
    seconds: float = PROMPTLY
    unheard: str | None = None
    bystander: str = "prefill"
    recover: Callable[[Deployment], None] = lambda deployment: None
    timeout: float = 600.0
    client_process: bool = False


def _freeze(service: str) -> Callable[[Deployment, Any], None]:
    def strike(deployment: Deployment, victim: Any) -> None:
        getattr(deployment, service).send(signal.SIGSTOP)
        deployment.back.release()

    return strike


def _kill(service: str) -> Callable[[Deployment, Any], None]:
    def strike(deployment: Deployment, victim: Any) -> None:
        getattr(deployment, service).kill()
        deployment.back.release()

    return strike


def _break_decode(trouble: str) -> Callable[[Deployment, Any], None]:
    def strike(deployment: Deployment, victim: Any) -> None:
        deployment.decode.sabotage(trouble)
        # Whoever generates next meets it, and more of them until the worker has had enough.
        for _ in range(FAILED_STEPS):
            other = RunningRequest(str(deployment.other_prefill.address), 4, 100, security=deployment.security)
            other.wait_for_end(SILENCE)
            other.close()
        deployment.back.release()
        assert deployment.decode.wait_for_end(SILENCE) == EXIT_BROKEN

    return strike


def _replace_decode(deployment: Deployment) -> None:
    deployment.decode.kill()
    deployment.restart(deployment.decode)


def _cancel(deployment: Deployment, victim: Any) -> None:
    victim.cancel()
    deployment.back.release()


def _kill_client(deployment: Deployment, victim: Any) -> None:
    victim.kill()
    deployment.back.release()


def _reset_front(deployment: Deployment, victim: Any) -> None:
    deployment.front.reset()
    deployment.back.release()


def _cut_front(deployment: Deployment, victim: Any) -> None:
    deployment.front.blackhole()
    deployment.back.release()


def _outlive(deployment: Deployment, victim: Any) -> None:
    """Wait for the request's deadline."""
    victim.wait_for_end(victim.timeout + PROMPTLY)
    assert victim.ended_at - victim.sent_at >= victim.timeout - 0.1
    deployment.back.release()


FAULTS = [
    Fault(
        "kill -9 prefill",
        _kill("prefill"),
        unheard="prefill",
        bystander="decode",
        recover=lambda deployment: deployment.restart(deployment.prefill),
    ),
    Fault(
        "kill -9 decode",
        _kill("decode"),
        unheard="decode",
        recover=lambda deployment: deployment.restart(deployment.decode),
    ),
    Fault(
        "prefill freezes",
        _freeze("prefill"),
        seconds=SILENCE,
        unheard="prefill",
        bystander="decode",
        recover=lambda deployment: deployment.prefill.send(signal.SIGCONT),
    ),
    Fault(
        "decode freezes",
        _freeze("decode"),
        seconds=SILENCE,
        unheard="decode",
        recover=lambda deployment: deployment.decode.send(signal.SIGCONT),
    ),
    Fault(
        "decode's steps fail",
        _break_decode(sabotage.FAILING_STEP),
        # Three requests, one after another, are served and fail before the worker has had enough.
        seconds=5 * PROMPTLY,
        unheard="decode",
        recover=_replace_decode,
    ),
    Fault(
        "decode's step hangs",
        _break_decode(sabotage.FROZEN_STEP),
        seconds=SILENCE,
        unheard="decode",
        recover=_replace_decode,
    ),
    Fault(
        "link client–prefill cut",
        _cut_front,
        seconds=SILENCE,
        recover=lambda deployment: deployment.front.reset(),
    ),
    Fault(
        "link prefill–decode cut",
        lambda deployment, victim: deployment.back.blackhole(),
        seconds=SILENCE,
        recover=lambda deployment: deployment.back.reset(),
    ),
    Fault("link client–prefill reset", _reset_front),
    Fault("link prefill–decode reset", lambda deployment, victim: deployment.back.reset()),
    Fault("client process killed", _kill_client, status=None, client_process=True),
    Fault("client cancels", _cancel, status="CANCELLED"),
    Fault("deadline passes", _outlive, status="DEADLINE_EXCEEDED", timeout=4.0),
]

# Those that a ping must go unanswered for, and the others.
SILENT_FAULTS = [fault for fault in FAULTS if fault.seconds == SILENCE]
PROMPT_FAULTS = [fault for fault in FAULTS if fault not in SILENT_FAULTS]
