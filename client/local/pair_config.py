"""Turn the options of a pair of services into the two commands that start it, and find free ports."""

import errno
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

from spectrumkv.client.local.memory_shares import kv_memory_of_both
from spectrumkv.client.local.service_process import ServiceLaunch
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.security import ChannelSecurity, TlsFiles
from spectrumkv.common.security.tls import optional_path
from spectrumkv.common.service.config import (
    Address,
    DecodeConfig,
    PrefillConfig,
    ServerConfig,
    build,
    flag_name,
)
from spectrumkv.common.service.options import option, parse_addresses

# Options as `common.service.config.build` takes them: names, and values as text, True or False.
Options = Mapping[str, Any]

FREE_PORTS: Options = {
    "listen": "127.0.0.1:0",
    "decode": "127.0.0.1:0",
    "metrics_listen": "127.0.0.1:0",
    "decode_metrics_listen": "127.0.0.1:0",
}

# Range in which a free port is searched: below the ephemeral ports, which systems assign on request (from 32768 on
# Linux, from 49152 on macOS and Windows), because a service listens only seconds after its port was found.
SEARCHED_PORTS = range(20_000, 32_768)
# Ports that this process has found already; their services may not listen yet.
_found_ports: set[int] = set()

# Run as the services' own commands are, so that they heed the limits of a control group.
# How long a service that hangs may take to say so as it ends.
LAST_WORDS_SECONDS = 5.0
DECODE_MODULE = "spectrumkv.decode_server"
PREFILL_MODULE = "spectrumkv.prefill_server"


@dataclass(frozen=True, kw_only=True)
class PairConfig(PrefillConfig, DecodeConfig):
    """Hold the options of `spectrumkv up`: every option of both services.

    `listen` and `metrics_listen` are prefill's; `decode` is the address on which the one decode service is started.
    Port 0 means any free port.

    Raises:
        InvalidArgumentError: there is more than one decode address, other machines could connect in plaintext
            without `allow_plaintext`, or TLS is on without the authority of the certificate.
    """

    listen: Address = option(  # noqa: RUF009  # it returns a dataclass field
        PrefillConfig.listen, "address to start the prefill service on", Address.parse
    )
    metrics_listen: Address = option(  # noqa: RUF009
        PrefillConfig.metrics_listen, "address for Prometheus of the prefill service", Address.parse
    )
    decode: tuple[Address, ...] = option(
        (DecodeConfig.listen,), "address to start the decode service on", parse_addresses
    )
    decode_metrics_listen: Address = option(  # noqa: RUF009
        DecodeConfig.metrics_listen, "address for Prometheus of the decode service", Address.parse
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.decode) != 1:
            addresses = ",".join(map(str, self.decode))
            raise InvalidArgumentError(f"--decode is {addresses}; allowed: one address, where one is started")
        if self.tls_cert is not None and self.tls_ca is None:
            raise InvalidArgumentError(
                "--tls-cert is given without --tls-ca, by which prefill knows decode; name its authority"
            )


def plan_launches(options: Options) -> tuple[ServiceLaunch, ServiceLaunch]:
    """Return how to start decode and prefill, in that order.

    Args:
        options: names of `PairConfig` and their values as text, True or False.

    Raises:
        InvalidArgumentError: a name is unknown, a value is not allowed, or memory for KV is given that is not there.
    """
    pair = build(PairConfig, dict(options))
    decode, decode_metrics, prefill, prefill_metrics = _with_ports(
        [pair.decode[0], pair.decode_metrics_listen, pair.listen, pair.metrics_listen]
    )
    more = {"decode": str(decode)}
    decode_bytes, prefill_bytes = kv_memory_of_both(
        pair.device, pair.kv_memory if "kv_memory" in options else None, pair.prefill_kv_memory
    )
    decodes = {} if "kv_memory" in options else {"kv_memory": str(decode_bytes)}
    if pair.prefill_kv_memory is None and prefill_bytes is not None:
        more["prefill_kv_memory"] = str(prefill_bytes)
    if pair.token_file is not None and pair.decode_token_file is None:
        # Both services accept the same tokens here.
        more["decode_token_file"] = pair.token_file
    return (
        _launch("decode", DECODE_MODULE, DecodeConfig, options, decode, decode_metrics, decodes),
        _launch("prefill", PREFILL_MODULE, PrefillConfig, options, prefill, prefill_metrics, more),
    )


def _launch(
    name: str,
    module: str,
    config_class: type[ServerConfig],
    options: Options,
    address: Address,
    metrics_address: Address,
    more: Options,
) -> ServiceLaunch:
    known = {declared.name for declared in fields(config_class)}
    own: dict[str, Any] = {key: value for key, value in options.items() if key in known}
    own |= {"listen": str(address), "metrics_listen": str(metrics_address), **more}
    # Refuse what the child would refuse, before anything is started.
    config = build(config_class, own)
    flags = [
        flag_name(key) if value is True else f"{flag_name(key)}={value}"
        for key, value in own.items()
        if value is not False
    ]
    # The service cancels what still runs after `grace`, and ends itself 10 s later where it hangs. Its log then says
    # where, so that it must not be killed at the same moment.
    command = (sys.executable, "-m", module, *flags)
    return ServiceLaunch(
        name, command, address, metrics_address, config.grace + 10.0 + LAST_WORDS_SECONDS, _security(config)
    )


def _security(config: ServerConfig) -> ChannelSecurity:
    """Return how this process talks to a service: with the certificate and the tokens of the service itself."""
    tls = TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca) if config.tls_cert is not None else None
    # The service is on this machine, whatever name of the machine it listens on.
    return ChannelSecurity(
        tls, optional_path(config.token_file), allow_plaintext=config.allow_plaintext, allow_proxy=False
    )


def _with_ports(addresses: Sequence[Address]) -> list[Address]:
    """Return the addresses with a free port for each port 0, after checking that the other ports are free.

    If another server used a port, it would answer in the place of ours. All ports are held until the last one is
    found, so that no port is given out twice.

    Raises:
        InvalidArgumentError: a service could not listen on one of the addresses.
    """
    with ExitStack() as held:
        return [_hold(held, address) for address in addresses]


def _hold(held: ExitStack, address: Address) -> Address:
    try:
        if not address.port:
            return _hold_any(held, address.host)
        held.enter_context(address.listener())
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot listen on {address}: {error.strerror}; stop what uses it or choose another port (0: any)"
        ) from error
    return address


def _hold_any(held: ExitStack, host: str) -> Address:
    """Return an address with a free port that this process has not found before.

    Raises:
        OSError: no port is free, or the host is none of this machine's.
    """
    start = random.SystemRandom().choice(SEARCHED_PORTS)
    for port in (*range(start, SEARCHED_PORTS.stop), *range(SEARCHED_PORTS.start, start)):
        if port not in _found_ports:
            try:
                held.enter_context(Address(host, port).listener())
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                _found_ports.add(port)
                return Address(host, port)
    raise OSError(errno.EADDRINUSE, f"no port from {SEARCHED_PORTS.start} to {SEARCHED_PORTS.stop - 1} is free")
