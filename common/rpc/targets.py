"""What a channel connects to: one server, or several prefill services, among which gRPC itself chooses."""

import json
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.options import Address, parse_addresses

PREFILL_SERVICE = "spectrumkv.v1.PrefillService"
# gRPC keeps requests up to this size to send them again elsewhere; the largest message is a little smaller.
RETRY_BUFFER_BYTES = 9 << 20
# gRPC takes the servers in turn that report SERVING. A request that is refused as UNAVAILABLE or lost before its
# first token goes to another server. gRPC allows five attempts; the pauses between them are longer than those before
# it tries a connection again.
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
    """Holds one address, or several addresses of prefill services.

    Attributes:
        addresses: at least one.

    Raises:
        InvalidArgumentError: there are several, and one of them is a name or of another IP version; gRPC accepts only
            lists of numeric addresses.
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
        """Return the target that `text` names: "host:port", or several such addresses separated by commas.

        Raises:
            InvalidArgumentError: `text` is something else, or the addresses do not go together.
        """
        try:
            return cls(parse_addresses(text))
        except ValueError as error:
            raise InvalidArgumentError(f"the server is {text!r}; allowed: {error}") from None

    def __str__(self) -> str:
        return ",".join(map(str, self.addresses))

    @property
    def uri(self) -> str:
        """The name under which gRPC opens a channel."""
        return str(self) if len(self.addresses) == 1 else f"ipv{self.addresses[0].ip_version}:{self}"

    @property
    def is_loopback(self) -> bool:
        """Whether every address is of this machine only."""
        return all(address.is_loopback for address in self.addresses)

    @property
    def hosts(self) -> set[str]:
        """Names or numeric addresses of the servers, without ports."""
        return {address.host for address in self.addresses}

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """Channel options that let gRPC choose among several servers; none where there is one."""
        if len(self.addresses) == 1:
            return ()
        return (
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
        )
