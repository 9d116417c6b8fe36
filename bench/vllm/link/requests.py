"""Run inside the prefill namespace: ask each system in turn, and record when tokens came and what the link carried.

`main` reads an `Errand` as JSON from standard input and writes a list of `Observed` as JSON to standard output.
"""

import json
import os
import signal
import sys
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener
from uuid import uuid4

import numpy as np

from spectrumkv.bench.link.requests import link_bytes_sent
from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.service.process import exit_on_error

ANSWER_SECONDS, ASK_AGAIN_SECONDS = 600.0, 1.0
# No proxy that the environment names can reach these namespaces.
DIRECT = build_opener(ProxyHandler({}))
EVENT, DONE = b"data: ", b"data: [DONE]"
# The pair whose servers a system's requests go to.
PAIR_OF = {"vllm": "spectrumkv", "spectrumkv": "spectrumkv", "nixl": "nixl"}


@dataclass(frozen=True)
class Setting:
    """Name a way to serve.

    Attributes:
        system: "vllm", "spectrumkv" or "nixl".
        name: in rows and plots.
        url: that is asked.
        fields: of the request, beside prompt and length.
    """

    system: str
    name: str
    url: str
    fields: dict[str, Any]

    @property
    def pair(self) -> str:
        """Return whose servers answer: "spectrumkv" or "nixl"."""
        return PAIR_OF[self.system]


@dataclass(frozen=True)
class Errand:
    """Say what to ask.

    Attributes:
        settings: asked in turn in every round, in the opposite order in every other one.
        groups: process groups of each pair's servers. Only one pair runs at a time: NIXL's look for messages without
            a pause, which takes more than one core.
        healthy: URLs that answer 200 when all is ready.
        ready_seconds: until then.
        rounds: that count.
        warm: whether one more comes first.
        prompt_tokens: of each prompt.
        output_tokens: to generate.
        vocabulary: tokens are drawn below this.
    """

    settings: tuple[Setting, ...]
    groups: Mapping[str, Sequence[int]]
    healthy: tuple[str, ...]
    ready_seconds: float
    rounds: int
    warm: bool
    prompt_tokens: int
    output_tokens: int
    vocabulary: int

    def to_json(self) -> str:
        """Return the errand as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Errand":
        """Return the errand that a JSON text describes."""
        content = json.loads(text)
        settings = tuple(Setting(**one) for one in content["settings"])
        return cls(**content | {"settings": settings, "healthy": tuple(content["healthy"])})


@dataclass(frozen=True)
class Observed:
    """Record one request.

    Attributes:
        setting: its name.
        arrivals: when its tokens came, in seconds after it was sent.
        link_bytes: that left prefill's side over the link, with all headers.
    """

    setting: str
    arrivals: tuple[float, ...]
    link_bytes: int


def main() -> None:
    """Do the errand on standard input, and write what was observed to standard output."""
    exit_on_error(lambda: do(Errand.from_json(sys.stdin.read())))


def do(errand: Errand) -> None:
    """Do an errand, and write what was observed to standard output; all pairs run again when it is done."""
    for url in errand.healthy:
        _wait(url, errand.ready_seconds)
    try:
        json.dump([asdict(one) for one in _observe(errand)], sys.stdout)
    finally:
        _run(errand.groups, tuple(errand.groups))


def _wait(url: str, seconds: float) -> None:
    """Wait until a URL answers.

    Raises:
        UnavailableError: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with DIRECT.open(url, timeout=ANSWER_SECONDS):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise UnavailableError(f"{url} does not answer: {error}; look into the logs") from error
        time.sleep(ASK_AGAIN_SECONDS)


def _observe(errand: Errand) -> Iterator[Observed]:
    for number in range(-errand.warm, errand.rounds):
        drawn = np.random.default_rng(number + 1).integers(3, errand.vocabulary, errand.prompt_tokens).tolist()
        for setting in errand.settings[:: -1 if number % 2 else 1]:
            _run(errand.groups, (setting.pair,))
            before = link_bytes_sent()
            arrivals = _ask(setting, drawn, errand.output_tokens)
            if number >= 0:
                yield Observed(setting.name, arrivals, link_bytes_sent() - before)


def _run(groups: Mapping[str, Sequence[int]], pairs: Sequence[str]) -> None:
    """Let some pairs' processes run, and stop the others'."""
    for pair, its_groups in groups.items():
        for group in its_groups:
            os.killpg(group, signal.SIGCONT if pair in pairs else signal.SIGSTOP)


def _ask(setting: Setting, prompt: list[int], tokens: int) -> tuple[float, ...]:
    """Return when the tokens of an answer came.

    Raises:
        UnavailableError: a server does not answer, refuses, or fails.
    """
    # Each request has a prefix cache of its own.
    body = {
        "model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "cache_salt": str(uuid4()), "return_token_ids": True,
    } | setting.fields  # fmt: skip
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    sent, arrivals = time.perf_counter(), []
    try:
        with DIRECT.open(Request(f"{setting.url}/v1/completions", data, kind), timeout=ANSWER_SECONDS) as answer:  # noqa: S310
            for line in answer:
                if not line.startswith(EVENT) or line.startswith(DONE):
                    continue
                event = json.loads(line.removeprefix(EVENT))
                if "error" in event:
                    raise UnavailableError(f"{setting.name}: {event['error']}")
                arrivals += [time.perf_counter() - sent] * bool(event["choices"])
    except OSError as error:
        raise UnavailableError(f"{setting.name} at {setting.url}: {error}") from error
    if len(arrivals) < 3:
        raise UnavailableError(f"{setting.name} sent {len(arrivals)} tokens; look into the logs")
    return tuple(arrivals)


if __name__ == "__main__":
    main()
