"""The `spectrumkv-decode` command."""

import sys
from collections.abc import Iterator

from spectrumkv.common.concurrency.threads import run_in_thread, use_one_thread
from spectrumkv.common.kv.codecs.base import prepare_codecs
from spectrumkv.common.model.load import load_model
from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, add_decode_servicer
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security import ServerSecurity
from spectrumkv.common.service import command_line, process
from spectrumkv.common.service.config import DecodeConfig
from spectrumkv.common.service.config_check import Line, model_lines, run_check, server_lines
from spectrumkv.common.service.process import set_up_logging
from spectrumkv.common.service.serving import serve_until_signalled
from spectrumkv.common.service.start_checks import check_start
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.tracing import set_up_spans
from spectrumkv.decode_server.service import DecodeService
from spectrumkv.kernels import decode_attention


def main() -> None:
    """Load the model, lay out the KV slots, and serve; with --check-config, say what would be served."""
    if command_line.asks_for_check(sys.argv[1:]):
        run_check(_check)
    process.run(_serve)


def _check() -> Iterator[Line]:
    config = _checked_config(may_run=True)
    yield from model_lines(config, "--kv-memory", config.kv_memory)
    yield from server_lines(config)
    yield "requests", f"{config.max_running} generate at once, {config.max_streams} hold KV slots"


def _checked_config(may_run: bool = False) -> DecodeConfig:
    """Read the options, and check what can be checked before the model is loaded.

    Args:
        may_run: let addresses be in use, by the same service perhaps.

    Returns:
        The options.
    """
    config = command_line.load(DecodeConfig, sys.argv[1:], "spectrumkv-decode")
    set_up_logging(config.log_level, config.log_format)
    set_up_spans("decode")
    check_start(config, may_run)
    return config


def _serve() -> None:
    config = _checked_config()
    service, metrics = run_in_thread(lambda: _prepared(config)) if config.spin else _prepared(config)
    server = Server(
        add_decode_servicer,
        service,
        SERVICE_NAME,
        threads=config.max_streams,
        count_ended=lambda code: metrics.requests.labels(code).inc(),
        count_silent=lambda reason: metrics.silent_calls_ended.labels(reason).inc(),
        count_closed=metrics.connections_closed.labels("address").inc,
        reflection_enabled=config.reflection,
        security=ServerSecurity.from_config(config),
        most_message_bytes=service.most_message_bytes,
        connections_per_address=config.max_connections_per_address,
        connection_seconds=config.max_connection_age,
    )
    service.start()
    use_one_thread()
    serve_until_signalled(server, metrics, config, service.stop, service.vitals)


def _prepared(config: DecodeConfig) -> tuple[DecodeService, Metrics]:
    """Return the service, with everything loaded and compiled that requests need."""
    loaded = load_model(config.model, config.device, config.dtype)
    prepare_codecs(loaded.geometry)
    decode_attention.prepare()
    metrics = Metrics.for_process("decode", loaded.name)
    return DecodeService(loaded, config, metrics), metrics


if __name__ == "__main__":
    main()
