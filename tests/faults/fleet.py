"""Several prefill and several decode services as processes of their own: every prefill knows every decode."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS, plan_launches
from tests.faults.deployment import Service, service_of
from tests.faults.incubator import Incubator

STOP_SECONDS = 90.0


@dataclass(frozen=True)
class Fleet:
    """The processes, all on one model."""

    prefills: list[Service]
    decodes: list[Service]

    @property
    def services(self) -> list[Service]:
        return self.decodes + self.prefills

    @property
    def addresses(self) -> str:
        """What clients connect to."""
        return ",".join(str(service.address) for service in self.prefills)

    def client(self) -> SpectrumClient:
        return SpectrumClient(self.addresses)

    def passed_over(self) -> float:
        """How often a request went on to another decode worker."""
        return sum(service.metrics().get("decode_workers_passed_over_total", 0.0) for service in self.prefills)


def restart_in_order(service: Service) -> None:
    """What an operator does: SIGTERM, wait for the end, start again, wait until it is ready."""
    service.send(signal.SIGTERM)
    assert service.process is not None
    assert service.process.wait(STOP_SECONDS) == 0
    service.start()
    service.wait_until_serving()


@contextlib.contextmanager
def running_fleet(
    directory: Path,
    model: Path,
    incubator: Incubator | None = None,
    size: int = 2,
    prefills: int | None = None,
    **options: str,
) -> Iterator[Fleet]:
    """Start `size` decode services, and as many prefill services or `prefills`. Fleets may share an incubator."""
    launches = [plan_launches({**FREE_PORTS, "model": str(model), "int4": "on", **options}) for _ in range(size)]
    with contextlib.ExitStack() as running:
        forking = incubator or running.enter_context(Incubator())
        decodes = [service_of(decode, directory, forking) for decode, _ in launches]
        senders = [service_of(prefill, directory, forking) for _, prefill in launches[:prefills]]
        workers = "--decode=" + ",".join(str(service.address) for service in decodes)
        for service in senders:
            service.command = (*(flag for flag in service.command if not flag.startswith("--decode=")), workers)
        fleet = Fleet(senders, decodes)
        for service in fleet.services:
            service.start()
            running.callback(service.kill)
        for service in fleet.services:
            service.wait_until_serving()
        yield fleet
