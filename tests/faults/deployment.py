"""Two prefill and two decode services as processes of their own, on a model that is slow where it must be.

    client ── front ──▶ prefill ── back ──▶ decode        what faults happen to
    others ───────────▶ prefill ──────────▶ small_decode  goes on while decode is gone
    others ───────────▶ other_prefill ────▶ decode        goes on while prefill is gone

`small_decode` is too small for the requests that faults happen to, so they always go to `decode`.
"""

import contextlib
import json
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS, plan_launches
from spectrumkv.client.local.service_process import ServiceLaunch
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service.config import Address
from tests.common.security.certificates import Authority
from tests.faults.incubator import ForkedProcess, Incubator
from tests.faults.link import Link, link_to
from tests.tiny_models import tiny_model

CONTEXT_LENGTH = 16384
DECODE_SLOTS, SMALL_SLOTS = 49_000, 10_000
# Of the tiny llama: 3 layers, 2 KV heads of 64, keys and values, float32.
SLOT_BYTES = 3 * 2 * 64 * 2 * 4
# Requests that generate at once on `decode`.
PLACES = 2
READY_SECONDS = 120.0
SCRAPE_SECONDS = 0.02
# Long for a step of the tiny model beside everything else, and short enough for a test.
STUCK_SECONDS = 5.0


def long_context_model(directory: Path) -> Path:
    """The tiny llama with room for long prompts: attention over 12 000 tokens takes seconds a layer."""
    shutil.copytree(tiny_model("llama"), directory)
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_LENGTH
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@dataclass
class Service:
    """One service's process."""

    name: str
    command: tuple[str, ...]
    address: Address
    metrics_address: Address
    log: Path
    security: ChannelSecurity
    incubator: Incubator
    switch: Path
    process: ForkedProcess | None = None

    def start(self) -> None:
        """Start without waiting."""
        self.process = self.incubator.start(self.command, self.log, self.switch)

    def wait_until_serving(self) -> None:
        with SpectrumClient(str(self.address), self.security) as client:
            client.wait_until_serving(READY_SECONDS)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def sabotage(self, trouble: str) -> None:
        """Break the service from inside at its next step (decode) or pass (prefill); see `sabotage`."""
        # In one piece: the service may look at any moment.
        written = self.switch.with_suffix(".written")
        written.write_text(trouble)
        written.rename(self.switch)

    def wait_for_end(self, seconds: float) -> int:
        """Wait until the process has ended by itself; return its exit status."""
        assert self.process is not None
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        return scraped(self.metrics_address)

    def held(self) -> "Held":
        return Held.by(self.metrics_address)


@dataclass(frozen=True)
class Held:
    """What a service holds for requests: bytes of KV, share of slots, and how many requests there are."""

    resident_bytes: float
    slots_used: float
    requests: float

    @classmethod
    def by(cls, metrics_address: Address) -> "Held":
        """What the service holds whose metrics are served there."""
        metrics = scraped(metrics_address)
        return cls(
            metrics["kv_bytes_resident"],
            metrics["kv_slots_used_ratio"],
            metrics["requests_running"] + metrics["requests_waiting"],
        )


NOTHING = Held(0, 0, 0)


def scraped(metrics_address: Address) -> dict[str, float]:
    """Every metric of a service by name, summed over labels, the prefix left out."""
    sums: dict[str, float] = {}
    with urllib.request.urlopen(f"http://{metrics_address}/metrics", timeout=10) as response:
        text = response.read().decode()
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            name = one.name.removeprefix("spectrumkv_")
            sums[name] = sums.get(name, 0.0) + one.value
    return sums


@dataclass
class Deployment:
    """All processes and links."""

    prefill: Service
    decode: Service
    other_prefill: Service
    small_decode: Service
    front: Link
    back: Link

    @property
    def services(self) -> list[Service]:
        return [self.prefill, self.decode, self.other_prefill, self.small_decode]

    @property
    def prefill_address(self) -> str:
        return str(self.prefill.address)

    @property
    def security(self) -> ChannelSecurity:
        """How clients talk to it, and services to each other."""
        return self.prefill.security

    def restart(self, service: Service) -> None:
        service.switch.unlink(missing_ok=True)
        service.start()
        service.wait_until_serving()


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Scrape until `condition()` is true; fail after `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(SCRAPE_SECONDS)


def secrets(directory: Path) -> dict[str, str]:
    """Options for mutual TLS and a bearer token on every channel."""
    authority = Authority("faults")
    files = authority.issue().write(directory / "secrets", authority)
    (directory / "secrets" / "tokens").write_text("secret-token-of-the-faults\n")
    return {
        "tls_cert": str(files.cert),
        "tls_key": str(files.key),
        "tls_ca": str(files.ca),
        "token_file": str(directory / "secrets" / "tokens"),
    }


@contextlib.contextmanager
def running_deployment(directory: Path, incubator: Incubator, secured: bool) -> Iterator[Deployment]:
    """Start all processes and links; `secured`: with mutual TLS and a bearer token on every channel."""
    model = str(long_context_model(directory / "model"))
    options = {"model": model, "int4": "on", "policy": "fp16", "budget": "1", **FREE_PORTS}
    options |= secrets(directory) if secured else {}
    with contextlib.ExitStack() as running:
        decode, other_prefill = (
            service_of(launch, directory, incubator)
            for launch in plan_launches(
                {**options, "kv_memory": str(DECODE_SLOTS * SLOT_BYTES), "max_running": str(PLACES)}
            )
        )
        small_decode, prefill = (
            service_of(launch, directory, incubator)
            for launch in plan_launches({**options, "kv_memory": str(SMALL_SLOTS * SLOT_BYTES)})
        )
        back = running.enter_context(link_to(decode.address.port))
        front = running.enter_context(link_to(prefill.address.port))
        workers = f"--decode={back.address},{small_decode.address}"
        decode.command = (*decode.command, f"--stuck-after={STUCK_SECONDS:g}")
        prefill.command = (*(flag for flag in prefill.command if not flag.startswith("--decode=")), workers)
        deployment = Deployment(prefill, decode, other_prefill, small_decode, front, back)
        for service in deployment.services:
            service.start()
            running.callback(service.kill)
        for service in deployment.services:
            service.wait_until_serving()
        yield deployment


def service_of(launch: ServiceLaunch, directory: Path, incubator: Incubator) -> Service:
    command = (sys.executable, *launch.command[1:])
    log = directory / f"{launch.name}-{launch.address}.log"
    return Service(
        launch.name,
        command,
        launch.address,
        launch.metrics_address,
        log,
        launch.security,
        incubator,
        log.with_suffix(".switch"),
    )
