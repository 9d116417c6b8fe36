"""Reads and writes `kv_transfer_params`, in which proxies, producer and consumer tell each other of a transfer.

The keys `do_remote_decode`, `do_remote_prefill`, `remote_host` and `remote_port` are those of vLLM's NixlConnector,
so that proxies made for it work.
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError

# What a request may say of a transfer that it does not decode over.
PREFETCH = ("", "begin", "drop")
# The part of a digest that tells prompts apart.
_DIGEST_DIGITS = 32


def prompt_digest(token_ids: Sequence[int]) -> str:
    """Return what tells a prompt from others.

    Args:
        token_ids: of the prompt.
    """
    data = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.sha256(data).hexdigest()[:_DIGEST_DIGITS]


@dataclass(frozen=True)
class DecodeElsewhere:
    """What a request asks of the producer: to hand its KV out.

    Attributes:
        transfer_id: as the proxy chose it; the request's own id where it chose none.
        policy: of the request; None for the connector's.
        budget: of the request; None for the connector's.
        fetches: how many requests will fetch the KV.
    """

    transfer_id: str
    policy: str | None
    budget: float | None
    fetches: int

    @classmethod
    def of(cls, request_id: str, params: Mapping[str, Any] | None) -> "DecodeElsewhere | None":
        """Read a request's parameters.

        Args:
            request_id: as vLLM knows it.
            params: `kv_transfer_params`.

        Returns:
            What is asked for; None where it is nothing.

        Raises:
            InvalidArgumentError: a value is not allowed.
        """
        if not params or not params.get("do_remote_decode"):
            return None
        transfer_id = _text(params, "transfer_id", request_id)
        budget, fetches, policy = params.get("budget"), params.get("fetches", 1), params.get("policy")
        if budget is not None and not (_is_number(budget) and 0 < budget <= 1):
            raise InvalidArgumentError(f"budget of kv_transfer_params is {budget!r}; allowed: above 0 and at most 1")
        if type(fetches) is not int or not 1 <= fetches <= 128:
            raise InvalidArgumentError(f"fetches of kv_transfer_params is {fetches!r}; allowed: 1 to 128")
        if policy is not None and not isinstance(policy, str):
            raise InvalidArgumentError(f"policy of kv_transfer_params is {policy!r}; allowed: a policy's name")
        return cls(transfer_id, policy, None if budget is None else float(budget), fetches)


@dataclass(frozen=True)
class PrefillElsewhere:
    """Where a consumer finds the KV of a request.

    Attributes:
        transfer_id: names the transfer on the producer.
        host: of the producer.
        port: of its rank 0; rank r has the port r higher.
        ranks: of the producer.
        tokens: whose KV is there; None for all of the prompt.
        policy: that coded them.
        budget: that they were coded at.
        digest: of these tokens' ids, see `prompt_digest`; None where the proxy calls before the producer answers.
        prefetch: "begin" where the request only announces the transfer, whose KV another request will take; "drop"
            where it takes that back; nothing where it decodes.
    """

    transfer_id: str
    host: str
    port: int
    ranks: int
    tokens: int | None
    policy: str
    budget: float
    digest: str | None
    prefetch: str = ""

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> "PrefillElsewhere | None":
        """Read a request's parameters.

        Args:
            params: `kv_transfer_params`.

        Returns:
            Where the KV is; None where there is none.

        Raises:
            InvalidArgumentError: a value is missing or not allowed.
        """
        if not params or not params.get("do_remote_prefill"):
            return None
        budget, digest = params.get("budget", 1.0), params.get("prompt_digest")
        if not _is_number(budget):
            raise InvalidArgumentError(f"budget of kv_transfer_params is {budget!r}; allowed: a number")
        if digest is not None and not isinstance(digest, str):
            raise InvalidArgumentError(f"prompt_digest of kv_transfer_params is {digest!r}; allowed: text")
        prefetch = _text(params, "prefetch", "")
        if prefetch not in PREFETCH:
            allowed = " or ".join(PREFETCH[1:])
            raise InvalidArgumentError(f"prefetch of kv_transfer_params is {prefetch!r}; allowed: {allowed}")
        tokens = params.get("remote_num_tokens")
        return cls(
            transfer_id=_text(params, "transfer_id"),
            host=_text(params, "remote_host"),
            port=_count(params, "remote_port", 65535),
            ranks=_count(params, "remote_ranks", 1024, 1),
            tokens=None if tokens is None else _count(params, "remote_num_tokens", 1 << 31),
            policy=_text(params, "policy", ""),
            budget=float(budget),
            digest=digest,
            prefetch=prefetch,
        )

    def to_params(self) -> dict[str, Any]:
        """Return the parameters that the producer answers with, for the request to the consumer."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": self.transfer_id,
            "remote_host": self.host,
            "remote_port": self.port,
            "remote_ranks": self.ranks,
            "remote_num_tokens": self.tokens,
            "policy": self.policy,
            "budget": self.budget,
            "prompt_digest": self.digest,
        }

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return "host:port" of each rank of the producer."""
        return tuple(f"{self.host}:{self.port + rank}" for rank in range(self.ranks))

    @property
    def is_exact(self) -> bool:
        """Tell whether the KV is the producer's own, bit for bit."""
        return self.policy == "native"

    @property
    def salt(self) -> str:
        """Return what keeps this KV apart from exact KV in a prefix cache; nothing where it is exact."""
        return "" if self.is_exact else f"spectrumkv {self.policy} {self.budget:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(params: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = params.get(name, default)
    if not isinstance(value, str) or (default is None and not value):
        raise InvalidArgumentError(f"{name} of kv_transfer_params is {value!r}; allowed: text")
    return value


def _count(params: Mapping[str, Any], name: str, most: int, default: int | None = None) -> int:
    value = params.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise InvalidArgumentError(f"{name} of kv_transfer_params is {value!r}; allowed: 1 to {most}")
    return value
