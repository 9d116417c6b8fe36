"""Real vLLM servers on this machine: one that prefills and one that decodes, each with its own failure policy.

vLLM is in an environment of its own (`make test-vllm`); where it is not installed, these tests are left out.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_model

# The first is a little less than what a test may take.
READY_SECONDS, ANSWER_SECONDS = 280.0, 60.0
BUDGET = 0.3
# Two blocks and a half: prefill takes several chunks, and the last block is partly filled.
CHUNK = 128

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


def wait_for(condition: Callable[[], bool], seconds: float, logs: Path | None = None) -> None:
    """Look until something is true that no event announces; a failure shows the ends of log files."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            shown = [
                f"{one.name}:\n{one.read_text(errors='replace')[-4000:]}" for one in (logs or Path()).glob("*.log")
            ]
            raise AssertionError("\n".join([f"it did not come true within {seconds:g} s", *shown]))
        threading.Event().wait(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A vLLM server.

    Attributes:
        port: of its API.
        process_group: of all its processes; 0 where others started it.
    """

    port: int
    process_group: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End it as a machine that fails does."""
        os.killpg(self.process_group, signal.SIGKILL)

    def post(self, path: str, body: dict[str, Any], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Send a request; an answer that is no 200 raises HTTPError."""
        sent = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(sent, timeout=seconds) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def complete(self, prompt: list[int], max_tokens: int, **others: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1}
        return self.post("/v1/completions", body | {"ignore_eos": True, "return_token_ids": True} | others)

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's series, or of those with a label."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=ANSWER_SECONDS) as answer:
            lines = answer.read().decode().splitlines()
        series = [line for line in lines if re.match(rf"{re.escape(name)}(\{{|\s)", line) and label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in series)

    @property
    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@contextmanager
def serving(
    role: str, folder: Path, policy: str = "fail", *flags: str, port: int = 0, transfer_port: int = 0
) -> Iterator[Server]:
    """Start a server; it is ready later (see `wait_for`). Without ports it takes free ones."""
    port, transfer_port, name = port or free_port(), transfer_port or free_port(), f"{role}-{policy}"
    transfer = {
        "kv_connector": "SpectrumKVConnector",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {
            "budget": BUDGET, "listen": f"127.0.0.1:{transfer_port}", "fetch_timeout": 20, "time_to_live": 20,
        },
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model("llama")),
        "--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "2048",
        "--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "8",
        "--kv-transfer-config", json.dumps(transfer), *flags,
    ]  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = inherited | {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with (folder / f"{name}.log").open("ab") as log:
        # vLLM's processes outlive their parent where that ends early, so they get a group of their own.
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield Server(port, process.pid)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Servers:
    """Both servers.

    Attributes:
        prefill: hands KV out, and takes some in; a request whose KV does not come fails.
        decode: takes KV in; a request whose KV does not come computes its prompt.
    """

    prefill: Server
    decode: Server


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("vllm")
    with ExitStack() as stopped:
        started = [
            stopped.enter_context(serving(role, folder, policy))
            for role, policy in (("kv_both", "fail"), ("kv_consumer", "recompute"))
        ]
        wait_for(lambda: all(one.is_ready for one in started), READY_SECONDS, folder)
        yield Servers(*started)
