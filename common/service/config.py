"""The configuration of both services: every option, its default and its limits, stated once.

An option can be given as a flag (`--kv-memory 4GiB`) or in a TOML file (`kv_memory = "4GiB"`) named by
`--config`; flags win. Unknown keys and bad values are refused with the name, the value and what is allowed.
"""

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.service.options import (
    WEEK_SECONDS,
    Address,
    allowed_by,
    number,
    one_of,
    option,
    or_auto,
    parse_addresses,
    parse_bytes,
)

__all__ = [
    "SCORE_WINDOW",
    "Address",
    "DecodeConfig",
    "PrefillConfig",
    "ServerConfig",
    "add_flags",
    "build",
    "flag_name",
    "load",
    "number",
    "option",
    "parse_addresses",
    "parse_bytes",
    "text_of",
]

# Queries at a prompt's end whose attention is observed. Calibration and the probe observe so many, whatever --window
# says: what they find is kept for later starts.
SCORE_WINDOW = 64


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What both services are told."""

    model: str | None = option(None, "local directory or hub name; the embedded SmolLM2-135M-Instruct if not given")
    device: str = option("auto", "where the model runs", one_of("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "dtype that the model computes in; auto is float32 on a CPU and the model's own on a GPU",
        one_of("auto", "float32", "float16", "bfloat16"),
    )
    listen: Address
    metrics_listen: Address
    tls_cert: str | None = option(None, "PEM file of this process's certificate and intermediate ones; serve by TLS")
    tls_key: str | None = option(None, "PEM file of that certificate's private key")
    tls_ca: str | None = option(
        None, "PEM file of the authorities that the certificates of clients, and of decode workers, must come from"
    )
    tls_clients: str = option(
        "verified", "with --tls-ca, whether clients must show a certificate of it", one_of("verified", "any")
    )
    token_file: str | None = option(None, "file of the bearer tokens that are accepted, one a line; all if not given")
    allow_plaintext: bool = option(False, "let traffic be unencrypted where other machines can reach it")
    reflection: bool = option(False, "let clients ask which services and messages there are")
    grace: float = option(30.0, "seconds that running requests get after SIGTERM", number(0, WEEK_SECONDS))
    deadline: float = option(
        600.0, "seconds until a request ends whose caller set no deadline", number(0.001, WEEK_SECONDS)
    )
    log_level: str = option("info", "least severe messages to log", one_of("debug", "info", "warning", "error"))
    log_format: str = option("text", "how log lines are written", one_of("text", "json"))

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_key is None else ("--tls-key", "--tls-cert")
            raise InvalidArgumentError(f"{given} is given without {missing}; a certificate and its key go together")
        if self.tls_cert is None:
            self._keep_plaintext_here("listen", self.listen, "give --tls-cert and --tls-key")
        # Prometheus has no part in the certificates of requests.
        self._keep_plaintext_here("metrics_listen", self.metrics_listen, "listen on 127.0.0.1")

    def _keep_plaintext_here(self, name: str, address: Address, remedy: str) -> None:
        """Refuse plaintext with another machine unless it is allowed."""
        if not address.is_loopback and not self.allow_plaintext:
            raise InvalidArgumentError(
                f"{flag_name(name)} is {address}, which other machines can reach, and traffic is not encrypted; "
                f"{remedy}, or pass --allow-plaintext"
            )


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(ServerConfig):
    """What the prefill service is told."""

    listen: Address = option(Address("127.0.0.1", 50051), "address to serve on", Address.parse)
    metrics_listen: Address = option(Address("127.0.0.1", 9464), "address for Prometheus", Address.parse)
    decode: tuple[Address, ...] = option(
        (Address("127.0.0.1", 50052),), "decode workers, separated by commas", parse_addresses
    )
    decode_token_file: str | None = option(
        None, "file whose first bearer token goes to decode workers; the variable SPECTRUMKV_TOKEN if not given"
    )
    policy: str = option("spectral", "how tokens get their tiers where a request does not say")
    budget: float | None = option(
        None,
        "bytes sent relative to FP16 where a request does not say; auto, the default, is the least that the probe "
        "found safe for the model",
        or_auto(number(0.05, 1)),
    )
    scorer: str = option("attention", "how tokens are ranked where a request does not say")
    codec: str = option("absmax", "how tiers are coded where a request does not say")
    scope: str = option(
        "layer", "whether tiers follow each layer's scores or all layers' together", one_of("layer", "model")
    )
    window: int = option(
        SCORE_WINDOW, "queries at the prompt's end whose attention is observed", number(1, 4096, int)
    )
    int4: str = option("auto", "whether INT4 is allowed; auto asks the probe", one_of("auto", "on", "off"))
    max_waiting: int = option(64, "requests that may be in the service at once", number(1, 4096, int))
    chunk_bytes: int = option(512 << 10, "payload at which a chunk leaves", number(1 << 10, 1 << 20, int))

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
    """What the decode service is told."""

    listen: Address = option(Address("127.0.0.1", 50052), "address to serve on", Address.parse)
    metrics_listen: Address = option(Address("127.0.0.1", 9465), "address for Prometheus", Address.parse)
    kv_memory: int = option(1 << 30, "memory for KV slots", parse_bytes, shown="1GiB")
    max_running: int = option(32, "requests that generate at once", number(1, 1024, int))
    max_streams: int = option(256, "requests that may hold slots at once", number(1, 4096, int))
    spin: bool = option(
        False,
        "on CPUs, let the model's threads spin between loops: faster steps where decode has the cores to itself",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tls_ca is not None and self.tls_cert is None:
            raise InvalidArgumentError(
                f"--tls-ca is {self.tls_ca}, but without --tls-cert there is no TLS to verify clients in; "
                "give --tls-cert and --tls-key"
            )


C = TypeVar("C", bound=ServerConfig)


def flag_name(option_name: str) -> str:
    """Return the flag of an option: "kv_memory" becomes "--kv-memory"."""
    return "--" + option_name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, config_class: type[ServerConfig]) -> None:
    """Add a flag for every option. A flag that is not given leaves no trace in the namespace."""
    for declared in fields(config_class):
        text = str(declared.metadata["help"])
        name, default = flag_name(declared.name), declared.default
        if isinstance(default, bool):
            shown = f"{text} (default: {'yes' if default else 'no'})"
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown)
            continue
        notes = [allowed_by(declared.metadata["parse"])]
        notes += [] if default is None else [f"default: {declared.metadata['shown'] or text_of(default)}"]
        suffix = "; ".join(filter(None, notes))
        shown = (f"{text} ({suffix})" if suffix else text).replace("%", "%%")
        parser.add_argument(name, default=argparse.SUPPRESS, metavar="VALUE", help=shown)


def text_of(value: Any) -> str:
    """Return an option's value as a flag would say it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidArgumentError(f"{message}; {self.prog} --help lists the options")


def load(config_class: type[C], arguments: Sequence[str], program: str) -> C:
    """Read flags and the file named by --config.

    Raises:
        InvalidArgumentError: a key is unknown, a value is not allowed, or the file cannot be read.
    """
    parser = _FlagParser(prog=program, description=config_class.__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with these options as keys")
    add_flags(parser, config_class)
    given = vars(parser.parse_args(arguments))
    path: Path | None = given.pop("config")
    return build(config_class, (_read_file(path) if path else {}) | given)


def build(config_class: type[C], given: dict[str, Any]) -> C:
    """Make a configuration from option names and their values as text (or true and false).

    Raises:
        InvalidArgumentError: a key is unknown or a value is not allowed.
    """
    declared = {one.name: one for one in fields(config_class)}
    for name in given:
        if name not in declared:
            raise InvalidArgumentError(f"unknown option {name!r}; valid: {', '.join(sorted(declared))}")
    return config_class(**{name: _parse(declared[name], value) for name, value in given.items()})


def _parse(declared: Any, value: Any) -> Any:
    name = flag_name(declared.name)
    if isinstance(declared.default, bool):
        if not isinstance(value, bool):
            raise InvalidArgumentError(f"{name} is {value!r}; allowed: true or false")
        return value
    kinds = (str, int, float, list) if isinstance(declared.default, tuple) else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InvalidArgumentError(f"{name} is {value!r}; allowed: text or a number")
    text = text_of(value)
    try:
        return declared.metadata["parse"](text)
    except ValueError as error:
        raise InvalidArgumentError(f"{name} is {text!r}; allowed: {error}") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(f"--config {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgumentError(f"--config {path} is no TOML file: {error}") from error
