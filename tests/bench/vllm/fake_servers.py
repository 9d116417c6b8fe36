"""Stand-ins for a pair of vLLM servers, which answer in vLLM's form and count what a bench reads."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from spectrumkv.bench.vllm.engine import COMPUTED_TOKENS, FETCHED_BYTES

VOCABULARY, UNLIKELY = 50, -40.0
BYTES_OF_A_TRANSFER = 300.0
Body = dict[str, Any]


@dataclass
class FakePair:
    """What both servers do.

    Attributes:
        forces: whether decode generates the tokens that a request forces.
        computes: whether decode computes prompts whose KV it should have got.
        text: what decode generates where nothing is forced.
        url: of the one server that plays both.
        counters: metrics of decode.
        asked: bodies of its requests.
    """

    forces: bool = True
    computes: bool = False
    text: str = "…"
    url: str = ""
    counters: dict[str, float] = field(default_factory=lambda: {FETCHED_BYTES: 0.0, COMPUTED_TOKENS: 0.0})
    asked: list[Body] = field(default_factory=list)

    def complete(self, body: Body) -> Body:
        self.asked.append(body)
        params = body.get("kv_transfer_params") or {}
        if params.get("do_remote_decode"):
            transfer = params | {"do_remote_decode": False, "do_remote_prefill": True}
            return {"choices": [{"text": "", "token_ids": [7]}], "kv_transfer_params": transfer}
        tokens = body.get("vllm_xargs", {}).get("forced_tokens", [7] * body["max_tokens"])
        self.counters[COMPUTED_TOKENS] += len(tokens)
        if params:
            self.counters[FETCHED_BYTES] += BYTES_OF_A_TRANSFER
        if self.computes or not params:
            self.counters[COMPUTED_TOKENS] += len(body["prompt"])
        error = 0.0 if params.get("policy", "native") == "native" else 1 - params["budget"]
        # As vLLM, it lists what it generated beside the most likely tokens.
        listed = [
            {f"token_id:{one}": value for one, value in ({token: UNLIKELY} | logprobs(error)).items()}
            for token in tokens
        ]
        generated = tokens if self.forces else [one + 1 for one in tokens]
        return {
            "choices": [{"text": self.text, "token_ids": generated, "logprobs": {"top_logprobs": listed}}],
            "kv_transfer_params": None,
        }

    def page(self, path: str) -> bytes:
        if path == "/metrics":
            return "".join(f'{name}{{engine="0"}} {value}\n' for name, value in self.counters.items()).encode()
        return json.dumps({"version": "0", "data": [{"id": "fake"}]}).encode()


def logprobs(error: float) -> dict[int, float]:
    """A distribution over the vocabulary; errors make unlikely tokens more likely."""
    logits = [-one / (4 + error) for one in range(VOCABULARY)]
    total = math.log(sum(map(math.exp, logits)))
    return {one: logit - total for one, logit in enumerate(logits)}


@contextmanager
def serving(pair: FakePair) -> Iterator[FakePair]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name in the base class
            self._answer(pair.page(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(json.dumps(pair.complete(body)).encode())

        def _answer(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            """Write nothing to the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        pair.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield pair
        finally:
            server.shutdown()
            thread.join()
