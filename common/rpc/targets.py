"""What a channel connects to: one server, or several prefill services, among which gRPC itself chooses.

Several are given as numeric addresses, or as a name that has an address for each of them.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.common.service.options import Address, parse_addresses

# gRPC takes the servers in turn that report SERVING.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # All of a server's services: `server_info` works on a decode service, too.
    "healthCheckConfig": {"serviceName": ""},
}


# A name server may be given as gRPC writes it; without one the machine's own is asked.
_DNS_URI = re.compile(r"dns:(?://(?P<name_server>[^/]*)/)?(?P<name>[^/]+)")


@dataclass(frozen=True)
class Target:
    """Holds one address or name, or several addresses of prefill services.

    Attributes:
        addresses: at least one.
        name_server: what gRPC asks for the name's addresses; None is what this machine asks.

    Raises:
        InvalidArgumentError: there are several, and one of them is a name or of another IP version; gRPC accepts only
            lists of numeric addresses.
    """

    addresses: tuple[Address, ...]
    name_server: Address | None = None

    def __post_init__(self) -> None:
        kinds = {address.ip_version for address in self.addresses}
        if len(self.addresses) > 1 and (None in kinds or len(kinds) > 1):
            raise InvalidArgumentError(
                f"the servers are {self}; allowed: one address or name, or several numeric addresses, all IPv4 or "
                "all IPv6"
            )
        if self.name_server is not None and not self.is_name:
            raise InvalidArgumentError(
                f"the server is {self.uri}, and no name server knows an address; leave out dns:"
            )

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Return the target that `text` names.

        Args:
            text: "host:port", also as "dns:///host:port" or with a name server as "dns://10.0.0.2:53/host:port"; or
                several numeric addresses separated by commas.

        Raises:
            InvalidArgumentError: `text` is something else, or the addresses do not go together.
        """
        uri = _DNS_URI.fullmatch(text)
        try:
            if uri is None:
                return cls(parse_addresses(text))
            name_server = Address.parse(uri["name_server"]) if uri["name_server"] else None
            return cls((Address.parse(uri["name"]),), name_server)
        except ValueError as error:
            raise InvalidArgumentError(
                f"the server is {quoted(text)}; allowed: {error}, or dns:///HOST:PORT"
            ) from None

    def __str__(self) -> str:
        return ",".join(map(str, self.addresses))

    @property
    def uri(self) -> str:
        """The name under which gRPC opens a channel."""
        if self.is_name or self.name_server is not None:
            return f"dns://{self.name_server or ''}/{self}"
        return str(self) if len(self.addresses) == 1 else f"ipv{self.addresses[0].ip_version}:{self}"

    @property
    def is_name(self) -> bool:
        """Whether the target is a name, which may have several addresses."""
        return self.addresses[0].ip_version is None

    @property
    def is_several(self) -> bool:
        """Whether there are several servers, or a name that may stand for several."""
        return len(self.addresses) > 1 or self.is_name

    @property
    def is_loopback(self) -> bool:
        """Whether every address is of this machine only."""
        # A name server may give any address for localhost.
        return self.name_server is None and all(address.is_loopback for address in self.addresses)

    @property
    def avoids_proxies(self) -> bool:
        """Whether no proxy may come between: the address is of this machine, or there are several addresses.

        gRPC would ask a proxy for the whole list as if it were one address.
        """
        return len(self.addresses) > 1 or self.addresses[0].leads_here

    @property
    def hosts(self) -> set[str]:
        """Names or numeric addresses of the servers, without ports."""
        return {address.host for address in self.addresses}

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """Channel options that let gRPC choose among several servers; none where there is one address."""
        if not self.is_several:
            return ()
        return (
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            # Names may bring a configuration of their own in a TXT record; ours is the one that is tested.
            ("grpc.service_config_disable_resolution", 1),
        )
