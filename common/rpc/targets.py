"""Where a channel leads: one server, or several that serve the same, between which gRPC itself chooses."""

import json
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.options import Address, parse_addresses

PREFILL_SERVICE = "spectrumkv.v1.PrefillService"
# A request with a prompt beyond this is not sent again elsewhere; the limit of one message is near it.
RETRY_BUFFER_BYTES = 9 << 20
# In turn among those whose health service says that they serve; what is refused or lost before the first token goes
# to another one. gRPC allows five attempts; the pauses between them outlast those before a connection is tried again.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": PREFILL_SERVICE},
    "methodConfig": [
        {
            "name": [{"service": PREFILL_SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


@dataclass(frozen=True)
class Target:
    """One address, or several of prefill services.

    Attributes:
        addresses: at least one.

    Raises:
        InvalidArgumentError: there are several, and one of them is a name or of another IP version: gRPC takes lists
            of numeric addresses only.
    """

    addresses: tuple[Address, ...]

    def __post_init__(self) -> None:
        kinds = {address.ip_version for address in self.addresses}
        if len(self.addresses) > 1 and (None in kinds or len(kinds) > 1):
            raise InvalidArgumentError(
                f"the servers are {self}; allowed: one address, or several numeric ones, all IPv4 or all IPv6"
            )

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read "host:port", or several separated by commas.

        Raises:
            InvalidArgumentError: it is something else.
        """
        try:
            return cls(parse_addresses(text))
        except ValueError as error:
            raise InvalidArgumentError(f"the server is {text!r}; allowed: {error}") from None

    def __str__(self) -> str:
        return ",".join(map(str, self.addresses))

    @property
    def uri(self) -> str:
        """What gRPC connects to."""
        return str(self) if len(self.addresses) == 1 else f"ipv{self.addresses[0].ip_version}:{self}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can be reached by it."""
        return all(address.is_loopback for address in self.addresses)

    @property
    def hosts(self) -> set[str]:
        """Names or numbers of the servers, ports left out."""
        return {address.host for address in self.addresses}

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """Channel options that choose among several servers."""
        if len(self.addresses) == 1:
            return ()
        return (
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        )
