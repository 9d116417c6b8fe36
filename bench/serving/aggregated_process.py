"""Run the process behind `aggregated`: transformers' `generate`, on a batch of the waiting requests at a time."""

import json
import math
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from spectrumkv.bench.report.results import describe_model
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.model.load import load_model
from spectrumkv.common.service.process import exit_on_error

# How long a batch that is not full waits for requests that are sent at the same time.
GATHER_SECONDS = 0.01
# The attention mask hides this token everywhere.
PADDING = 0


@dataclass(frozen=True)
class WaitingRequest:
    """Hold a request: its number, its prompt, and how many tokens to generate."""

    id: int
    token_ids: tuple[int, ...]
    output_tokens: int


# None marks the end of all requests.
Waiting = queue.Queue[WaitingRequest | None]


class LineStreamer(BaseStreamer):  # type: ignore[misc]  # transformers is not followed
    """Write each token of a batch as a line while `generate` runs.

    Args:
        batch: the requests, in the order of the rows.
    """

    def __init__(self, batch: Sequence[WaitingRequest]) -> None:
        self._batch = batch
        self._step = -1

    def put(self, value: torch.Tensor) -> None:
        """Write a token for each row, `[batch]`; skip the first call, which has the prompts, `[batch, n]`."""
        self._step += 1
        if self._step == 0:
            return
        for request, token_id in zip(self._batch, value.tolist(), strict=True):
            if self._step <= request.output_tokens:
                _write(request.id, token_id)
            if self._step == request.output_tokens:
                _write(request.id, None)
        sys.stdout.flush()

    def end(self) -> None:
        """Do nothing: every token is already written."""


def main() -> None:
    """Load the model, write its description, and serve requests until standard input ends."""
    exit_on_error(_serve)


def _serve() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    max_batch, max_tokens = int(options.pop("max_batch")), int(options.pop("max_tokens"))
    # Users of transformers alone have no packed weights.
    loaded = load_model(options["model"], options["device"], options["dtype"], packed=False)
    if max_tokens > loaded.context_length:
        raise InvalidArgumentError(
            f"prompt and completion are {max_tokens} tokens, and {loaded.name} has a context of "
            f"{loaded.context_length}"
        )
    description = describe_model(loaded) | {"vocab_size": loaded.spec.vocab_size}
    sys.stdout.write(json.dumps(description) + "\n")
    sys.stdout.flush()
    waiting: Waiting = queue.Queue()
    threading.Thread(target=_read, args=(waiting,), name="requests", daemon=True).start()
    while batch := _gather(waiting, max_batch):
        _generate(loaded.model, batch)


def _read(waiting: Waiting) -> None:
    for line in sys.stdin:
        content = json.loads(line)
        waiting.put(WaitingRequest(content["id"], tuple(content["token_ids"]), content["output_tokens"]))
    waiting.put(None)


def _gather(waiting: Waiting, max_batch: int) -> list[WaitingRequest]:
    """Return the waiting requests and those that soon follow; an empty batch is the end of all requests."""
    batch: list[WaitingRequest] = []
    until = math.inf
    while len(batch) < max_batch:
        try:
            request = waiting.get(timeout=None if until == math.inf else max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        if request is None:
            break
        batch.append(request)
        until = min(until, time.monotonic() + GATHER_SECONDS)
    return batch


@torch.inference_mode()
def _generate(model: PreTrainedModel, batch: Sequence[WaitingRequest]) -> None:
    longest = max(len(request.token_ids) for request in batch)
    ids = [[PADDING] * (longest - len(request.token_ids)) + list(request.token_ids) for request in batch]
    mask = [[0] * (longest - len(request.token_ids)) + [1] * len(request.token_ids) for request in batch]
    output_tokens = max(request.output_tokens for request in batch)
    model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=output_tokens,
        min_new_tokens=output_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=PADDING,
        eos_token_id=None,
        streamer=LineStreamer(batch),
    )


def _write(request_id: int, token_id: int | None) -> None:
    sys.stdout.write(json.dumps({"id": request_id, "token_id": token_id}) + "\n")


if __name__ == "__main__":
    main()
