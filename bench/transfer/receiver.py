"""Run the receiving process of the transfer bench: `receiving_process` starts it, and it runs `main`."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry

from spectrumkv.bench.transfer.kv import ReceivingServicer
from spectrumkv.bench.transfer.raw import RawTransferServicer, TcpReceiver, add_raw_transfer_servicer
from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.rpc.decode_methods import SERVICE_NAME, add_decode_servicer
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security import ServerSecurity, TlsFiles
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import KvPool

HOST = "127.0.0.1"
STREAMS = 4


@dataclass(frozen=True)
class ReceiverAddresses:
    """Hold the addresses that the receiving process listens on.

    Attributes:
        tcp: the address of a `TcpReceiver`.
        grpc: the address of a server with a `RawTransferServicer` and a `ReceivingServicer`.
        grpc_tls: the address of the same server over mutual TLS; None without certificates.
    """

    tcp: Address
    grpc: Address
    grpc_tls: Address | None


@contextmanager
def receiving_process(geometry: KvGeometry, tokens: int, tls: TlsFiles | None = None) -> Iterator[ReceiverAddresses]:
    """Start a process that receives KV caches of this shape; end it with the block.

    Args:
        geometry: the shape of the caches.
        tokens: tokens of each cache.
        tls: certificate, key and authority; with them, the process listens over mutual TLS too.

    Yields:
        The addresses of the process.

    Raises:
        UnavailableError: the process ended before it listened.
    """
    process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _addresses(process, _described(geometry, tokens, tls))
    finally:
        # The process ends when its standard input does, so it also ends if this process is killed.
        process.communicate()


def main() -> None:
    """Read the caches' shape from standard input, write the ports to standard output, receive until input ends."""
    described: dict[str, Any] = json.loads(sys.stdin.readline())
    tokens, tls = int(described.pop("tokens")), described.pop("tls")
    geometry = KvGeometry(**described | {"native_dtype": getattr(torch, described["native_dtype"])})
    message_bytes = geometry.fp16_bytes(tokens)
    metrics = Metrics(CollectorRegistry())
    slot_bytes = geometry.layers * geometry.native_bytes_per_token_layer
    servicer = ReceivingServicer(KvPool(geometry, tokens * slot_bytes, torch.device("cpu"), metrics), metrics)
    securities = {"grpc": ServerSecurity()}
    if tls is not None:
        securities["grpc_tls"] = ServerSecurity(TlsFiles.named(*tls), verify_clients=True)
    servers = {
        name: Server(
            lambda servicer, grpc_server: _add_servicers(servicer, message_bytes, grpc_server),
            servicer,
            SERVICE_NAME,
            threads=STREAMS,
            count_ended=lambda code: metrics.requests.labels(code).inc(),
            security=security,
        )
        for name, security in securities.items()
    }
    ports = {name: server.bind(f"{HOST}:0") for name, server in servers.items()}
    for server in servers.values():
        server.start()
    ports["tcp"] = TcpReceiver(HOST, message_bytes).port
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    for server in servers.values():
        server.drain(0, threading.Event())


def _described(geometry: KvGeometry, tokens: int, tls: TlsFiles | None) -> str:
    return json.dumps(
        {
            "layers": geometry.layers,
            "kv_heads": geometry.kv_heads,
            "head_dim": geometry.head_dim,
            "native_dtype": str(geometry.native_dtype).removeprefix("torch."),
            "tokens": tokens,
            "tls": None if tls is None else [str(tls.cert), str(tls.key), str(tls.ca)],
        }
    )


def _addresses(process: "subprocess.Popen[str]", described: str) -> ReceiverAddresses:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process was started without pipes")
    process.stdin.write(described + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise UnavailableError(
            f"the receiving process ended with status {process.wait()}; its error is on standard error"
        )
    ports = json.loads(answer)
    encrypted = Address(HOST, ports["grpc_tls"]) if "grpc_tls" in ports else None
    return ReceiverAddresses(Address(HOST, ports["tcp"]), Address(HOST, ports["grpc"]), encrypted)


def _add_servicers(servicer: object, message_bytes: int, server: grpc.Server) -> None:
    add_decode_servicer(servicer, server)
    add_raw_transfer_servicer(RawTransferServicer(message_bytes), server)


if __name__ == "__main__":
    main()
