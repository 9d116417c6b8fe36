"""Asks vLLM servers over HTTP."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from spectrumkv.common.errors import UnavailableError

Json = dict[str, Any]
ANSWER_SECONDS = 600.0
# Metrics of a consumer: bytes of all messages that it fetched, and tokens that its model computed.
FETCHED_BYTES, COMPUTED_TOKENS = "spectrumkv:kv_bytes_fetched_total", "vllm:iteration_tokens_total_sum"


def setting_name(params: Mapping[str, Any]) -> str:
    """Return a setting in a few words.

    Args:
        params: its `kv_transfer_params`.
    """
    return " ".join([str(params["policy"]), *([f"{params['budget']:g}"] if "budget" in params else [])])


@dataclass(frozen=True)
class Engine:
    """A vLLM server.

    Attributes:
        url: "http://host:port".
        model: the name that it serves.
    """

    url: str
    model: str

    @classmethod
    def at(cls, url: str) -> "Engine":
        """Find out what a server serves.

        Args:
            url: "http://host:port".

        Returns:
            The server.

        Raises:
            UnavailableError: it does not answer.
        """
        return cls(url, json.loads(_read(f"{url}/v1/models"))["data"][0]["id"])

    @property
    def version(self) -> str:
        """Return the version of vLLM.

        Raises:
            UnavailableError: the server does not answer.
        """
        return str(json.loads(_read(f"{self.url}/version"))["version"])

    def complete(self, token_ids: list[int], max_tokens: int, **others: Any) -> dict[str, Any]:
        """Complete a prompt greedily.

        Args:
            token_ids: the prompt.
            max_tokens: most tokens to generate.
            **others: further fields of the request.

        Returns:
            The answer's JSON.

        Raises:
            UnavailableError: the server does not answer, or refuses.
        """
        body = {"model": self.model, "prompt": token_ids, "max_tokens": max_tokens, "temperature": 0} | others
        found: dict[str, Any] = json.loads(_read(f"{self.url}/v1/completions", json.dumps(body).encode()))
        return found

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series, 0 where it has none.

        Args:
            name: as `/metrics` has it.

        Raises:
            UnavailableError: the server does not answer.
        """
        lines = _read(f"{self.url}/metrics").decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}(\{{|\s)", line))


@dataclass(frozen=True)
class EnginePair:
    """A server that prefills and one that decodes.

    Attributes:
        prefill: a producer.
        decode: a consumer.
    """

    prefill: Engine
    decode: Engine

    def prefilled(self, token_ids: list[int], **params: Any) -> tuple[Json, Json | None]:
        """Have prefill compute a prompt and the first token.

        No prefix cache is used: a hit would leave fewer queries to rank tokens by.

        Args:
            token_ids: the prompt.
            **params: further `kv_transfer_params`.

        Returns:
            The first token as a choice of the answer's JSON, and `kv_transfer_params` for decode; None where the
            text ends with that token.

        Raises:
            UnavailableError: the server does not answer, or refuses.
        """
        wanted = {"do_remote_decode": True} | params
        answer = self.prefill.complete(
            token_ids, 1, return_token_ids=True, cache_salt=str(uuid4()), kv_transfer_params=wanted
        )
        return answer["choices"][0], answer["kv_transfer_params"]

    def complete(self, token_ids: list[int], max_tokens: int, **params: Any) -> str:
        """Complete a prompt, the first token by prefill and the others by decode.

        Args:
            token_ids: the prompt.
            max_tokens: most tokens to generate.
            **params: further `kv_transfer_params`.

        Returns:
            The text.

        Raises:
            UnavailableError: a server does not answer, or refuses.
        """
        first, transfer = self.prefilled(token_ids, **params)
        if transfer is None:
            return str(first["text"])
        prompt = [*token_ids, *first["token_ids"]]
        rest = self.decode.complete(prompt, max_tokens - 1, cache_salt=str(uuid4()), kv_transfer_params=transfer)
        return str(first["text"]) + str(rest["choices"][0]["text"])


def _read(url: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310  # the user's own
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:  # noqa: S310
            data: bytes = answer.read()
            return data
    except urllib.error.HTTPError as error:
        raise UnavailableError(f"{url} answers {error.code}: {error.read()[:400]!r}; look into its log") from error
    except OSError as error:
        raise UnavailableError(f"{url} does not answer: {error}; is the server running?") from error
