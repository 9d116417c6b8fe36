"""Services behind names, as pods behind a headless service: they come, leave and die under load."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS, plan_launches
from spectrumkv.common.security import ChannelSecurity
from tests.faults import names
from tests.faults.deployment import NOTHING, Service, service_of, until
from tests.faults.fleet import STOP_SECONDS, Fleet, restart_in_order
from tests.faults.incubator import Incubator
from tests.faults.names import NameServer
from tests.faults.report import tell
from tests.faults.workers.load import CLIENTS, Load
from tests.tiny_models import tiny_model

# "Pods" have addresses of their own and one port.
PODS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
DECODE_NAME, PREFILL_NAME = "decode.pods", "prefill.pods"
RESOLVE_SECONDS = 0.5
CONNECTION_SECONDS = 3


@dataclass(frozen=True)
class NamedFleet(Fleet):
    """Prefills that know decode by its name, and clients that know prefill by its name."""

    directory: Path
    name_server: NameServer

    def client(self) -> SpectrumClient:
        target = f"dns://{self.name_server.address}/{PREFILL_NAME}:{self.prefills[0].address.port}"
        return SpectrumClient(target, ChannelSecurity(allow_plaintext=True))

    def place(self, decodes: slice) -> None:
        """Have the name stand for some of the decode services."""
        names.say(self.directory, DECODE_NAME, [one.address.host for one in self.decodes[decodes]])

    def taking(self) -> float:
        """How many decode workers the first prefill knows that take requests."""
        return self.prefills[0].metrics().get("decode_worker_accepting", 0.0)

    def shares(self, load: Load) -> list[float]:
        """The share of each decode service in the requests of the next moments."""
        before = [one.metrics().get("requests_total", 0.0) for one in self.decodes]
        answers = load.answers
        until(lambda: load.answers > answers + 60, 60, "requests go on")
        served = [
            one.metrics().get("requests_total", 0.0) - past for one, past in zip(self.decodes, before, strict=True)
        ]
        return [one / sum(served) for one in served]


@contextlib.contextmanager
def named_fleet(directory: Path, incubator: Incubator) -> Iterator[NamedFleet]:
    """Start a decode service on each pod's address, and a prefill service on two."""
    options = {**FREE_PORTS, "model": str(tiny_model("llama")), "int4": "on", "kv_memory": "64MiB"}
    decode_port = prefill_port = 0
    decodes: list[Service] = []
    prefills: list[Service] = []
    with contextlib.ExitStack() as running:
        for host in PODS:
            places = {"decode": f"{host}:{decode_port}", "listen": f"{host}:{prefill_port}"}
            decode, prefill = plan_launches({**options, **places})
            decode_port, prefill_port = decode.address.port, prefill.address.port
            decodes.append(service_of(decode, directory, incubator))
            prefills.append(service_of(prefill, directory, incubator))
        for one in prefills:
            kept = (flag for flag in one.command if not flag.startswith("--decode="))
            workers = (f"--decode={DECODE_NAME}:{decode_port}", f"--resolve-interval={RESOLVE_SECONDS}")
            one.command = (*kept, *workers, "--allow-plaintext", f"--max-connection-age={CONNECTION_SECONDS}")
        name_server = running.enter_context(NameServer(PODS[:2]).serving())
        fleet = NamedFleet(prefills[:2], decodes, directory, name_server)
        fleet.place(slice(1))
        for service in fleet.services:
            service.start()
            running.callback(service.kill)
        for service in fleet.services:
            service.wait_until_serving()
        yield fleet


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_services_behind_names_come_leave_and_die(
    tmp_path: Path, incubator: Incubator, capsys: pytest.CaptureFixture[str]
) -> None:
    with named_fleet(tmp_path, incubator) as fleet:
        until(lambda: fleet.taking() == 1, 20, "the one address of the name is known")
        load = Load(fleet)
        assert fleet.shares(load) == [1, 0, 0]

        fleet.place(slice(3))
        started = time.monotonic()
        until(lambda: fleet.taking() == 3, 10, "each new address is a worker")
        tell(capsys, f"two decode workers were added {time.monotonic() - started:.1f} s after their addresses")
        shares = fleet.shares(load)
        tell(capsys, f"shares of three decode workers: {', '.join(f'{share:.0%}' for share in shares)}")
        assert min(shares) >= 0.2

        fleet.place(slice(1, 3))
        until(lambda: fleet.taking() == 2, 10, "the worker whose address is gone is let go")
        until(lambda: fleet.decodes[0].held() == NOTHING, 10, "its requests have ended")
        stop(fleet.decodes[0])
        go_on(load)

        # The name server has no answer for a while, which says nothing of the workers.
        names.say(tmp_path, DECODE_NAME, [])
        until(lambda: fleet.prefills[0].metrics()["decode_name_resolved"] == 0, 10, "the look-up fails")
        assert fleet.taking() == 2
        go_on(load)
        assert load.errors == []

        # Streams that have begun are lost with their process; every other request goes elsewhere.
        fleet.prefills[0].kill()
        go_on(load)
        lost = len(load.errors)
        assert lost <= CLIENTS
        for _ in range(3):
            go_on(load)
        load.stop()
        assert len(load.errors) == lost
        tell(capsys, f"{load.answers} requests, {lost} lost, all of them with the prefill process that was killed")


def stop(service: Service) -> None:
    service.send(signal.SIGTERM)
    assert service.wait_for_end(STOP_SECONDS) == 0


def go_on(load: Load) -> None:
    answers = load.answers
    until(lambda: load.answers > answers + 4 * CLIENTS, 60, "requests go on")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rolling_update_of_pods_loses_no_request(
    tmp_path: Path, incubator: Incubator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each pod's address leaves the name, then SIGTERM comes, and its successor's joins once that is ready."""
    with named_fleet(tmp_path, incubator) as fleet:
        fleet.place(slice(2))
        until(lambda: fleet.taking() == 2, 20, "both addresses of the name are known")
        load = Load(fleet)
        for number in range(2):
            fleet.place(slice(1 - number, 2 - number))
            until(lambda: fleet.taking() == 1, 10, "the worker whose address is gone is let go")
            restart_in_order(fleet.decodes[number])
            fleet.place(slice(2))
            until(lambda: fleet.taking() == 2, 10, "its successor is known")
            go_on(load)
        for number in range(2):
            fleet.name_server.hosts = PODS[1 - number : 2 - number]
            served = fleet.prefills[1 - number].metrics()["requests_total"]
            restart_in_order(fleet.prefills[number])
            fleet.name_server.hosts = PODS[:2]
            go_on(load)
            assert fleet.prefills[1 - number].metrics()["requests_total"] > served
            # Connections end after a while, so that clients find the new one.
            successor = fleet.prefills[number]
            until(lambda one=successor: one.metrics().get("requests_total", 0.0) > 0, 30, "it is found")
        until(lambda: load.answers >= 300, 120, "300 requests")
        load.stop()
        tell(capsys, f"{load.answers} requests while 4 pods were replaced in turn, {len(load.errors)} lost")
        assert load.errors == []
