"""The `spectrumkv-prefill` command."""

import logging
import sys
from collections.abc import Iterator

from spectrumkv.common.concurrency.threads import use_one_thread
from spectrumkv.common.errors import ContextTooShortError
from spectrumkv.common.kv.allocation import Int4Layers
from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.base import codecs, prepare_codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.kv.warm_up import encode_once
from spectrumkv.common.model.load import LoadedModel, load_model
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security import ChannelSecurity, ServerSecurity
from spectrumkv.common.service import command_line, process
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.service.config_check import Line, model_lines, run_check, server_lines
from spectrumkv.common.service.process import set_up_logging
from spectrumkv.common.service.serving import serve_until_signalled
from spectrumkv.common.service.start_checks import check_start
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.common.telemetry.tracing import set_up_spans
from spectrumkv.kernels import attention_scores
from spectrumkv.prefill_server.engine import PrefillEngine
from spectrumkv.prefill_server.service import PrefillService
from spectrumkv.prefill_server.transfer.plan import check_defaults
from spectrumkv.prefill_server.tuning.basis_cache import EXCERPTS, resolve_basis
from spectrumkv.prefill_server.tuning.probe.probe import resolve_verdict
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.prefill_server.workers.names import described_target
from spectrumkv.v1 import prefill_pb2_grpc

# Tokens of the prompt that kernels are compiled with; any number does.
WARM_UP_TOKENS = 128

logger = logging.getLogger(__name__)


def main() -> None:
    """Load the model, find its codec basis and how strongly its KV may be coded, then serve.

    With --check-config, say what would be served.
    """
    if command_line.asks_for_check(sys.argv[1:]):
        run_check(_check)
    process.run(_serve)


def _check() -> Iterator[Line]:
    config = _checked_config(may_run=True)
    yield from model_lines(config, "--prefill-kv-memory", config.prefill_kv_memory)
    yield from server_lines(config)
    for target in config.decode:
        yield "decode", described_target(target)
    yield (
        "KV",
        f"policy {config.policy}, budget {config.budget or 'auto'}, codec {config.codec}, scope {config.scope}",
    )


def _checked_config(may_run: bool = False) -> PrefillConfig:
    """Read the options, and check what can be checked before the model is loaded.

    Args:
        may_run: let addresses be in use, by the same service perhaps.

    Returns:
        The options.
    """
    config = command_line.load(PrefillConfig, sys.argv[1:], "spectrumkv-prefill")
    set_up_logging(config.log_level, config.log_format)
    set_up_spans("prefill")
    check_start(config, may_run)
    ChannelSecurity.to_decode(config).check()
    check_defaults(config)
    return config


def _serve() -> None:
    config = _checked_config()
    loaded = load_model(config.model, config.device, config.dtype)
    prepare_codecs(loaded.geometry)
    attention_scores.prepare()
    metrics = Metrics.for_process("prefill", loaded.name)
    engine = PrefillEngine(loaded, config.window)
    engine.start()
    compile_for_gpu(loaded, engine)
    basis, verdict = tune(loaded, engine, config)
    service = PrefillService(loaded, config, metrics, engine, verdict, basis)
    server = Server(
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
        service,
        "spectrumkv.v1.PrefillService",
        threads=config.max_waiting,
        count_ended=lambda code: metrics.requests.labels(code).inc(),
        count_silent=lambda reason: metrics.silent_calls_ended.labels(reason).inc(),
        count_closed=metrics.connections_closed.labels("address").inc,
        reflection_enabled=config.reflection,
        security=ServerSecurity.from_config(config),
        most_message_bytes=service.most_message_bytes,
        connections_per_address=config.max_connections_per_address,
        connection_seconds=config.max_connection_age,
    )
    use_one_thread()
    service.start()
    serve_until_signalled(server, metrics, config, service.stop, engine.vitals)


def compile_for_gpu(loaded: LoadedModel, engine: PrefillEngine) -> None:
    """Have Triton compile what requests will launch; on a CPU nothing is left to compile.

    Args:
        loaded: the model.
        engine: runs the model.
    """
    if loaded.device.type != "cuda":
        return
    captures: list[LayerCapture] = []
    engine.submit([0] * min(WARM_UP_TOKENS, loaded.context_length), captures.append).result()
    # Layers differ in their sliding windows, and one kernel serves all of these.
    encode_once(captures[:1], loaded.geometry)


def tune(loaded: LoadedModel, engine: PrefillEngine, config: PrefillConfig) -> tuple[Basis | None, ProbeVerdict]:
    """Calibrate and probe the model, unless earlier starts did.

    Args:
        loaded: the model.
        engine: runs the model.
        config: of the service.

    Returns:
        The basis, and how strongly KV may be coded. Where the model's context is too short for either and the default
        policy needs no basis, the basis may be None, and INT4 is off: requests for a policy that needs the basis are
        refused.

    Raises:
        ContextTooShortError: the model's context is too short, and the default policy needs a basis.
    """
    basis = None
    try:
        basis = resolve_basis(loaded, lambda done: logger.info("calibrated on excerpt %d of %d", done, EXCERPTS))
        return basis, resolve_verdict(loaded, engine, basis, config.int4, logger.info)
    except ContextTooShortError as error:
        if codecs.get(policies.get(config.policy).codec or config.codec).needs_basis:
            raise
        logger.warning("%s; INT4 is off%s", error, "" if basis else ", and policies that need a basis are refused")
        reason = f"nothing was probed: {error}"
        return basis, ProbeVerdict(Int4Layers.in_none(loaded.geometry.layers), "flag", reason)


if __name__ == "__main__":
    main()
