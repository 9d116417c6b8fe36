"""A gateway on a real socket of this process, and what tests ask it with."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from spectrumkv.common.service.config import build
from spectrumkv.gateway.app import make_app
from spectrumkv.gateway.config import GatewayConfig
from spectrumkv.gateway.main import GatewayServer, listening, server_config
from spectrumkv.gateway.metrics import GatewayMetrics

WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has exactly the keys of the OpenAI API."""
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The objects of a stream of server-sent events, which ends with [DONE]."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class RunningGateway:
    """A gateway that serves."""

    port: int
    metrics: GatewayMetrics

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_SECONDS)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = self.connect()
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, sent, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        answer = Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        )
        connection.close()
        return answer

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def complete(self, body: dict[str, Any] | None = None, **fields: Any) -> Answer:
        return self.ask("POST", "/v1/completions", {"prompt": "x", **(body or {}), **fields})

    def chat(self, **fields: Any) -> Answer:
        messages = [{"role": "user", "content": "Why is the sky blue?"}]
        return self.ask("POST", "/v1/chat/completions", {"messages": messages, **fields})

    def counted(self, route: str, status: int) -> float:
        labels = {"route": route, "status": str(status)}
        return self.metrics.registry.get_sample_value("spectrumkv_gateway_requests_total", labels) or 0.0


@contextlib.contextmanager
def running_gateway(prefill: str, **options: Any) -> Iterator[RunningGateway]:
    """Serve on a free port of loopback."""
    config = build(GatewayConfig, {"listen": "127.0.0.1:0", "prefill": prefill, "grace": "2", **options})
    metrics = GatewayMetrics(CollectorRegistry())
    server = GatewayServer(server_config(make_app(config, metrics), config))
    metrics.connections.set_function(lambda: len(server.server_state.connections))
    with listening(config) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), name="gateway")
        thread.start()
        try:
            yield RunningGateway(listener.getsockname()[1], metrics)
        finally:
            server.should_exit = True
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()
