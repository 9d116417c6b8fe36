"""States every option of both services once, with its default and its limits.

An option can be given as a flag (`--kv-memory 4GiB`) or in a TOML file (`kv_memory = "4GiB"`) that `--config` names;
a flag wins over the file. Unknown keys and bad values are refused with the name, the value and what is allowed. Why
this is not pydantic-settings: docs/adr/0111-configuration.md.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from spectrumkv.common.errors import InvalidArgumentError, quoted
from spectrumkv.common.kv.budget import BUDGET_MEANING
from spectrumkv.common.service.options import (
    WEEK_SECONDS,
    Address,
    check_certificate_and_key,
    flag_name,
    number,
    one_of,
    option,
    or_auto,
    or_never,
    parse_addresses,
    parse_bytes,
    text_of,
)

__all__ = [
    "SCORE_WINDOW",
    "Address",
    "DecodeConfig",
    "PrefillConfig",
    "ServerConfig",
    "build",
    "flag_name",
]

# Queries at a prompt's end whose attention is observed. Calibration and the probe observe so many, whatever --window
# says: what they find is kept for later starts.
SCORE_WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The options of both services."""

    model: str | None = option(None, "local directory or hub name; the embedded SmolLM2-135M-Instruct if not given")
    device: str = option("auto", "where the model runs", one_of("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "dtype that the model computes in; auto is float32 on a CPU and the model's own on a GPU",
        one_of("auto", "float32", "float16", "bfloat16"),
    )
    threads: int | None = option(
        None,
        "threads that run the model on CPUs; auto, the default, is one for each processor that this process may use",
        or_auto(number(1, 1024, int)),
    )
    listen: Address
    metrics_listen: Address
    tls_cert: str | None = option(None, "PEM file of this process's certificate and intermediate ones; turns TLS on")
    tls_key: str | None = option(None, "PEM file of that certificate's private key")
    tls_ca: str | None = option(
        None, "PEM file of the authorities that must have issued the certificates of clients and decode workers"
    )
    tls_clients: str = option(
        "verified",
        "with --tls-ca, whether clients must show a certificate of these authorities",
        one_of("verified", "any"),
    )
    tls_client_names: str | None = option(
        None,
        "names, separated by commas, of which a client's certificate must have one to bring work: common names, "
        "names of hosts, and URIs after URI:",
    )
    token_file: str | None = option(
        None, "file of the accepted bearer tokens, one a line; calls need none if not given"
    )
    allow_plaintext: bool = option(False, "allow unencrypted traffic on addresses that other machines can reach")
    allow_plaintext_metrics: bool = option(
        False, "allow unencrypted metrics on addresses that other machines can reach"
    )
    max_connections_per_address: int | None = option(
        None,
        "connections that one address may have; auto, the default, is half of all that the service takes",
        or_auto(number(1, 65536, int)),
    )
    max_connection_age: float | None = option(
        300.0,
        "seconds after which a connection gets no new requests and its caller connects again; running ones go on",
        or_never(number(1, WEEK_SECONDS)),
    )
    reflection: bool = option(False, "serve gRPC reflection, by which clients list services and messages")
    grace: float = option(30.0, "seconds that running requests may take after SIGTERM", number(0, WEEK_SECONDS))
    stuck_after: float = option(
        120.0, "seconds without progress of the model after which the process ends itself", number(1, WEEK_SECONDS)
    )
    deadline: float = option(
        600.0, "seconds after which a request ends if its caller set no deadline", number(0.001, WEEK_SECONDS)
    )
    max_deadline: float = option(
        3600.0, "seconds after which a request ends, however long its caller allows", number(0.001, WEEK_SECONDS)
    )
    log_level: str = option("info", "least severe level to log", one_of("debug", "info", "warning", "error"))
    log_format: str = option("text", "format of log lines", one_of("text", "json"))

    def __post_init__(self) -> None:
        check_certificate_and_key(self.tls_cert, self.tls_key)
        if self.deadline > self.max_deadline:
            raise InvalidArgumentError(
                f"--deadline is {self.deadline:g}, more than --max-deadline allows, which is {self.max_deadline:g}; "
                "raise that, too"
            )
        if self.tls_client_names and not all(name.strip() for name in self.tls_client_names.split(",")):
            raise InvalidArgumentError(
                f"--tls-client-names is {quoted(self.tls_client_names)}; allowed: names, separated by commas"
            )
        if self.tls_client_names and None in (self.tls_cert, self.tls_ca):
            raise InvalidArgumentError(
                "--tls-client-names asks for names in clients' certificates; give --tls-cert, --tls-key and --tls-ca"
            )
        if self.tls_client_names and self.tls_clients == "any":
            raise InvalidArgumentError("--tls-client-names asks for certificates; leave out --tls-clients any")
        if self.tls_cert is None:
            self._keep_plaintext_here("listen", self.listen, "give --tls-cert and --tls-key")
        # Metrics are always served as plaintext: TLS is for requests only.
        if not self.allow_plaintext_metrics:
            self._keep_plaintext_here(
                "metrics_listen", self.metrics_listen, "listen on 127.0.0.1, pass --allow-plaintext-metrics"
            )

    def _keep_plaintext_here(self, name: str, address: Address, remedy: str) -> None:
        """Refuse an address that other machines can reach by plaintext, unless that is allowed.

        Raises:
            InvalidArgumentError: the address is refused.
        """
        if not address.is_loopback and not self.allow_plaintext:
            raise InvalidArgumentError(
                f"{flag_name(name)} is {address}, which other machines can reach, and traffic is not encrypted; "
                f"{remedy}, or pass --allow-plaintext"
            )


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(ServerConfig):
    """The options of the prefill service."""

    listen: Address = option(Address("127.0.0.1", 50051), "address to serve on", Address.parse)
    metrics_listen: Address = option(Address("127.0.0.1", 9464), "address for Prometheus", Address.parse)
    decode: tuple[Address, ...] = option(
        (Address("127.0.0.1", 50052),),
        "decode workers, separated by commas; a name stands for a worker at each of its addresses",
        parse_addresses,
    )
    resolve_interval: float = option(5.0, "seconds between two look-ups of a name in --decode", number(0.1, 3600))
    decode_token_file: str | None = option(
        None, "file whose first bearer token is sent to decode workers; the variable SPECTRUMKV_TOKEN if not given"
    )
    policy: str = option("spectral", "how tokens are assigned to tiers, unless a request says")
    budget: float | None = option(
        None,
        f"what KV may cost relative to FP16, unless a request says: {BUDGET_MEANING}; auto, the default, is the "
        "least in bytes that the probe found safe, or a mean cost of 0.3 (more where some layers do without INT4)",
        or_auto(number(0.05, 1)),
    )
    scorer: str = option("attention", "how tokens are ranked, unless a request says")
    codec: str = option("absmax", "how tiers are coded, unless a request says")
    scope: str = option(
        "layer", "whether tiers follow the scores of each layer or of all layers together", one_of("layer", "model")
    )
    window: int = option(
        SCORE_WINDOW, "queries at the end of the prompt whose attention is scored", number(1, 4096, int)
    )
    int4: str = option("auto", "whether INT4 is allowed; auto asks the probe", one_of("auto", "on", "off"))
    allow_control_tokens: bool = option(
        False, "let control tokens of the model, such as <|im_end|>, act as such in the content of chat messages"
    )
    max_waiting: int = option(64, "requests that may be in the service at once", number(1, 4096, int))
    prefill_kv_memory: int | None = option(
        None,
        "memory for KV that has not left for decode: a prompt starts when its KV fits; auto, the default, is half of "
        "the memory where the model runs",
        or_auto(parse_bytes),
    )
    chunk_bytes: int = option(512 << 10, "payload bytes at which a chunk is sent", number(1 << 10, 1 << 20, int))

    def __post_init__(self) -> None:
        super().__post_init__()
        for address in self.decode:
            if self.decode.count(address) > 1:
                raise InvalidArgumentError(f"--decode names {address} more than once; name each worker once")
        if self.tls_ca is None:
            for address in self.decode:
                self._keep_plaintext_here("decode", address, "name the authorities of its certificate with --tls-ca")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(ServerConfig):
    """The options of the decode service."""

    listen: Address = option(Address("127.0.0.1", 50052), "address to serve on", Address.parse)
    metrics_listen: Address = option(Address("127.0.0.1", 9465), "address for Prometheus", Address.parse)
    kv_memory: int = option(1 << 30, "memory for KV slots", parse_bytes, shown="1GiB")
    max_running: int = option(32, "requests that generate at once", number(1, 1024, int))
    max_streams: int = option(256, "requests that may hold KV slots at once", number(1, 4096, int))
    spin: bool = option(
        False, "on CPUs, let the model's threads spin between loops: faster steps if decode has the cores to itself"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tls_ca is not None and self.tls_cert is None:
            raise InvalidArgumentError(
                f"--tls-ca is {self.tls_ca}, but without --tls-cert there is no TLS to verify clients in; "
                "give --tls-cert and --tls-key"
            )


T = TypeVar("T")


def build(config_class: type[T], given: dict[str, Any]) -> T:
    """Read options from values by name.

    Args:
        config_class: a dataclass whose fields are made by `option`, such as `PrefillConfig`.
        given: the values as text (or true and false), by the options' names.

    Returns:
        The options.

    Raises:
        InvalidArgumentError: a key is unknown or a value is not allowed.
    """
    declared = {one.name: one for one in fields(config_class)}  # type: ignore[arg-type]  # it is a dataclass
    for name in given:
        if name not in declared:
            raise InvalidArgumentError(f"unknown option {quoted(name)}; allowed: {', '.join(sorted(declared))}")
    return config_class(**{name: _parse(declared[name], value) for name, value in given.items()})


def _parse(declared: Any, value: Any) -> Any:
    name = flag_name(declared.name)
    if isinstance(declared.default, bool):
        if not isinstance(value, bool):
            raise InvalidArgumentError(f"{name} is {quoted(value)}; allowed: true or false")
        return value
    kinds = (str, int, float, list) if isinstance(declared.default, tuple) else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InvalidArgumentError(f"{name} is {quoted(value)}; allowed: text or a number")
    try:
        text = text_of(value)
    except ValueError:
        raise InvalidArgumentError(f"{name} is a number of thousands of digits; allowed: a shorter one") from None
    try:
        return declared.metadata["parse"](text)
    except ValueError as error:
        raise InvalidArgumentError(f"{name} is {quoted(text)}; allowed: {error}") from None
