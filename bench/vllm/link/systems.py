"""Starts pairs of vLLM servers on the ends of a shaped link, with SpectrumKVConnector and with NixlConnector."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrumkv.bench.link.network import DECODE_HOST, LINK, PREFILL_HOST, Namespace, ShapedLink
from spectrumkv.common.errors import FailedPreconditionError

STOP_SECONDS = 30.0
CONTEXT_TOKENS = 4096
SYSTEMS = ("vllm", "spectrumkv", "nixl")
# Ports inside the bench's own namespaces, which are all free.
PREFILL_PORTS = {"spectrumkv": 8100, "nixl": 8101}
DECODE_PORTS = {"spectrumkv": 8200, "nixl": 8201}
PROXY_PORTS = {"spectrumkv": 8000, "nixl": 8001}
TRANSFER_PORT, HANDSHAKE_PORT = 14600, 5600


@dataclass(frozen=True)
class Engines:
    """How vLLM is run.

    Attributes:
        python: interpreter of vLLM's environment.
        model: directory of the model.
        cache_gib: memory of each server's KV cache.
        logs: folder for what servers write.
    """

    python: str
    model: Path
    cache_gib: int
    logs: Path

    def check(self, systems: tuple[str, ...]) -> None:
        """Check that the environment has what the systems need.

        Args:
            systems: of `SYSTEMS`.

        Raises:
            FailedPreconditionError: a package is missing; the message says how to get it.
        """
        for package, wanted, remedy in (
            ("vllm", True, "name the interpreter of vLLM's environment in --python (docs/vllm.md)"),
            ("nixl", "nixl" in systems, "pip install --no-deps nixl nixl-cu12, or leave nixl out of --systems"),
        ):
            program = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
            if wanted and subprocess.run([self.python, "-c", program], check=False).returncode:  # noqa: S603
                raise FailedPreconditionError(f"{self.python} has no package {package}; {remedy}")


@contextmanager
def running_pair(system: str, engines: Engines, link: ShapedLink) -> Iterator[list[int]]:
    """Start a pair and its proxy, which are ready later; stop them with the block.

    Args:
        system: "spectrumkv" or "nixl".
        engines: how vLLM is run.
        link: joins the servers; the proxy runs beside prefill.

    Yields:
        The process groups of the servers and the proxy.
    """
    ends = ((link.prefill, PREFILL_HOST, "prefill"), (link.decode, DECODE_HOST, "decode"))
    with ExitStack() as running:
        groups = []
        for namespace, host, role in ends:
            transfer, more = transfer_config(system, role), _nixl_environment(host) if system == "nixl" else {}
            port = (PREFILL_PORTS if role == "prefill" else DECODE_PORTS)[system]
            command = server_command(engines, port, transfer)
            environment = _environment(engines, host) | more
            log = engines.logs / f"{system}-{role}.log"
            groups.append(running.enter_context(_process(namespace, command, environment, log)))
        proxy = [
            engines.python, "-m", "spectrumkv.client.cli.main", "vllm-proxy",
            "--prefill", f"http://{PREFILL_HOST}:{PREFILL_PORTS[system]}",
            "--decode", f"http://{DECODE_HOST}:{DECODE_PORTS[system]}",
            "--listen", f"{PREFILL_HOST}:{PROXY_PORTS[system]}",
        ]  # fmt: skip
        log = engines.logs / f"{system}-proxy.log"
        groups.append(running.enter_context(_process(link.prefill, proxy, dict(os.environ), log)))
        yield groups


def transfer_config(system: str, role: str) -> dict[str, Any]:
    """Return `--kv-transfer-config`.

    Args:
        system: "spectrumkv" or "nixl".
        role: "prefill" or "decode".
    """
    if system == "nixl":
        return {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return {
        "kv_connector": "SpectrumKVConnector",
        "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
        "kv_connector_extra_config": {
            "listen": f"{PREFILL_HOST}:{TRANSFER_PORT}", "allow_plaintext": True, "fetch_timeout": 300,
        },
    }  # fmt: skip


def server_command(engines: Engines, port: int, transfer: Mapping[str, Any]) -> list[str]:
    """Return the command of a server.

    Args:
        engines: how vLLM is run.
        port: of its API.
        transfer: see `transfer_config`.
    """
    return [
        engines.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(engines.model),
        "--served-model-name", "model", "--host", "0.0.0.0", "--port", str(port), "--dtype", "float32",  # noqa: S104
        "--enforce-eager", "--max-model-len", str(CONTEXT_TOKENS), "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip


def _environment(engines: Engines, host: str) -> dict[str, str]:
    return dict(os.environ) | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": host,
        "VLLM_CPU_KVCACHE_SPACE": str(engines.cache_gib), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip


def _nixl_environment(host: str) -> dict[str, str]:
    """Return what NIXL needs; both ends are one machine, so that UCX would pass the link by through shared memory."""
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(HANDSHAKE_PORT),
        "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": LINK,
    }  # fmt: skip


@contextmanager
def _process(namespace: Namespace, command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[int]:
    """Run a process in a group of its own, and stop it with the block.

    Yields:
        The group.
    """
    with log.open("wb") as written:
        # vLLM's processes outlive their parent where that ends early, and are stopped and continued together.
        process = subprocess.Popen(  # noqa: S603  # our own words
            namespace.command(*command),
            env=dict(environment),
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process.pid
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
