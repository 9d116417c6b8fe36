"""Ask for time lines: what is asked, and the process that answers."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spectrumkv.common.errors import DeadlineExceededError, UnavailableError

PREFILL_MODULE = "spectrumkv.bench.device.timeline.prefill_process"


@dataclass(frozen=True)
class TimelineRequest:
    """Say which time lines are taken.

    Attributes:
        shape: of the model, a name of `bench.models.shaped_model.SHAPES`.
        device: "cuda" or "cpu", for both sides.
        tokens: of the prompt.
        rounds: rounds that count.
        contenders: see `bench.device.scale`.
    """

    shape: str
    device: str
    tokens: int
    rounds: int
    contenders: tuple[str, ...]

    def to_json(self) -> str:
        """Return the request as the process reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TimelineRequest":
        """Return the request that `to_json` wrote."""
        content: dict[str, Any] = json.loads(text)
        return cls(**content | {"contenders": tuple(content["contenders"])})


def take_timelines(request: TimelineRequest, environment: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Take time lines in a prefill process, which starts a decode process; both end before this returns.

    Args:
        request: which ones.
        environment: of both processes.
        seconds: that they may take.

    Returns:
        The description of the "model", and "rows", one for each contender.

    Raises:
        UnavailableError: the process failed.
        DeadlineExceededError: it took longer.
    """
    with subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", PREFILL_MODULE, request.to_json()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=dict(environment),
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise DeadlineExceededError(
                f"the time lines took longer than the {seconds:.0f} s that were left"
            ) from None
        finally:
            process.kill()
    if process.returncode:
        raise UnavailableError(
            f"the prefill side ended with status {process.returncode}; its error is on standard error"
        )
    result: dict[str, Any] = json.loads(output)
    return result
