"""Says what a service would serve with its options, without serving it: `--check-config`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import NoReturn

import torch

from spectrumkv.common.errors import FailedPreconditionError, SpectrumKVError
from spectrumkv.common.model.outline import ModelOutline, outline_model
from spectrumkv.common.security import TlsFiles
from spectrumkv.common.security.file_metrics import first_expiry
from spectrumkv.common.service import machine
from spectrumkv.common.service.config import ServerConfig
from spectrumkv.common.service.machine import shown_bytes

# The exit status of a check that found something, other than that of a service that ended.
EXIT_UNUSABLE = 2

# A subject and what is said of it.
Line = tuple[str, str]


def run_check(check: Callable[[], Iterator[Line]]) -> NoReturn:
    """Print what a service would serve and end the process with status 0, or say what is wrong and end it with 2.

    Args:
        check: yields what would be served; its `SpectrumKVError` is what is wrong.
    """
    try:
        lines = list(check())
    except SpectrumKVError as error:
        # A stream that is full changes no status.
        with suppress(OSError):
            sys.stderr.write(f"error: {error.message}\n")
        sys.exit(EXIT_UNUSABLE)
    width = max(len(subject) for subject, _ in lines)
    sys.stdout.writelines(f"{subject:{width}}  {text}\n" for subject, text in lines)
    sys.exit(0)


def server_lines(config: ServerConfig) -> Iterator[Line]:
    """Yield what holds for both services: where they listen, to whom, and until when.

    Args:
        config: the options, whose files were checked.

    Raises:
        InvalidArgumentError: a file of certificates cannot be used any more.
    """
    yield "listens", f"{config.listen}, {'TLS' if config.tls_cert else 'plaintext'}"
    yield "metrics", f"{config.metrics_listen}, plaintext"
    certificates = TlsFiles.named(config.tls_cert, config.tls_key, config.tls_ca).watch().current
    for option, pem in (("--tls-cert", certificates.chain), ("--tls-ca", certificates.ca)):
        if pem is not None:
            expiry = datetime.fromtimestamp(first_expiry(pem), UTC)
            over = ", which is over" if expiry < datetime.now(UTC) else ""
            yield option, f"expires {expiry:%Y-%m-%d %H:%M} UTC{over}"
    yield "callers", "need a token" if config.token_file else "need no token"


def model_lines(config: ServerConfig, kv_option: str, kv_bytes: int | None) -> Iterator[Line]:
    """Yield which model is served, and whether it and its KV fit.

    Args:
        config: the options.
        kv_option: the flag that says how much memory KV gets.
        kv_bytes: what it says; None where the service finds it.

    Raises:
        FailedPreconditionError: the model cannot be served, or there is not so much memory.
    """
    model = outline_model(config.model, config.device, config.dtype)
    if model is None:
        yield "model", f"{config.model or 'the embedded default'}, which is not here and is fetched at the start"
        return
    geometry = model.geometry
    yield (
        "model",
        f"{model.name} ({model.architecture}), {geometry.layers} layers, {geometry.kv_heads} KV heads of "
        f"{geometry.head_dim}, context {model.context_length}",
    )
    dtype = str(geometry.native_dtype).removeprefix("torch.")
    yield "weights", f"{shown_bytes(model.weight_bytes)} in {dtype} on {model.device}"
    token_bytes = geometry.layers * geometry.native_bytes_per_token_layer
    if kv_bytes is None:
        yield kv_option, f"auto; a token takes {token_bytes} bytes"
    elif kv_bytes < token_bytes:
        raise FailedPreconditionError(
            f"{kv_option} of {kv_bytes} bytes holds no token; one takes {token_bytes} bytes"
        )
    else:
        yield (
            kv_option,
            f"{shown_bytes(kv_bytes)}, which holds {kv_bytes // token_bytes} tokens of {token_bytes} bytes",
        )
    yield "memory", _check_memory(model, kv_option, kv_bytes or 0)


def _check_memory(model: ModelOutline, kv_option: str, kv_bytes: int) -> str:
    """Return how much memory there is.

    Raises:
        FailedPreconditionError: weights and KV do not fit.
    """
    if model.device.type == "cuda":
        there: int | None = torch.cuda.get_device_properties(model.device).total_memory
        whose = "of the GPU"
    else:
        there, whose = (
            machine.bytes_left(),
            "that this machine, or the control group of this process, leaves for them",
        )
    if there is None:
        return "not known"
    if model.weight_bytes + kv_bytes > there:
        raise FailedPreconditionError(
            f"the weights of {model.name} take {shown_bytes(model.weight_bytes)} and {kv_option} "
            f"{shown_bytes(kv_bytes)}, together more than the "
            f"{shown_bytes(there)} {whose}; lower {kv_option}, or give the service more memory"
        )
    return f"{shown_bytes(there)} {whose}"
