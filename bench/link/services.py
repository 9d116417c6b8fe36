"""Run both services, each in its own namespace, and do errands beside prefill."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from spectrumkv.bench.link import requests
from spectrumkv.bench.link.network import DECODE_HOST, Namespace, ShapedLink
from spectrumkv.bench.link.requests import SECURITY, Errand
from spectrumkv.client.local.pair_config import DECODE_MODULE, PREFILL_MODULE
from spectrumkv.client.local.service_process import ServiceLaunch, ServiceProcess
from spectrumkv.common.errors import UnavailableError
from spectrumkv.common.service.config import Address, DecodeConfig, PrefillConfig

# Every port is free inside the bench's own namespaces.
DECODE = Address(DECODE_HOST, DecodeConfig.listen.port)
PREFILL = PrefillConfig.listen
PREFILL_METRICS = PrefillConfig.metrics_listen
STOP_SECONDS = 40.0


class LinkedServices:
    """Hold a running decode and a running prefill service on the two ends of a link.

    Args:
        link: the link and its namespaces.
    """

    def __init__(self, link: ShapedLink) -> None:
        self._link = link
        self._ended: list[ServiceProcess] = []
        self._errand: subprocess.Popen[str] | None = None

    def started(self, launch: ServiceLaunch) -> ServiceProcess:
        """Return a service that was just started; if it ends by itself, the running errand is stopped."""
        return ServiceProcess(launch, on_line=lambda line: None, on_exit=self._note_end)

    def run(self, errand: Errand) -> dict[str, Any]:
        """Do an errand in the prefill namespace; return its "model" and what it "observed".

        Returns:
            The served "model" and the list "observed".

        Raises:
            UnavailableError: a service ended, or the errand failed.
        """
        command = self._link.prefill.command(sys.executable, "-m", requests.__name__)
        with subprocess.Popen(  # noqa: S603  # our own interpreter and module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as self._errand:
            try:
                self._stop_errand_of_dead_services()
                output, _ = self._errand.communicate(errand.to_json())
            finally:
                self._errand.kill()
        if self._errand.returncode:
            if self._ended:
                raise self._ended[0].death()
            raise UnavailableError("the requests inside the namespace failed; standard error has their error")
        result: dict[str, Any] = json.loads(output)
        return result

    def _note_end(self, service: ServiceProcess) -> None:
        self._ended.append(service)
        self._stop_errand_of_dead_services()

    def _stop_errand_of_dead_services(self) -> None:
        if self._ended and self._errand is not None:
            self._errand.terminate()


@contextmanager
def linked_services(link: ShapedLink, options: Mapping[str, str]) -> Iterator[LinkedServices]:
    """Start both services, and stop them with the block; errands wait until the services are ready.

    Args:
        link: the link and its namespaces.
        options: options of prefill; decode gets those that it shares.

    Yields:
        The services.
    """
    services = LinkedServices(link)
    with ExitStack() as running:
        for launch in (_decode_launch(link.decode, options), _prefill_launch(link.prefill, options)):
            running.callback(services.started(launch).stop)
        yield services


def _decode_launch(namespace: Namespace, options: Mapping[str, str]) -> ServiceLaunch:
    shared = {name: value for name, value in options.items() if name in ("model", "device", "dtype")}
    flags = ["--allow-plaintext", f"--listen={DECODE}", *(f"--{name}={value}" for name, value in shared.items())]
    command = namespace.command(sys.executable, "-m", DECODE_MODULE, *flags)
    return ServiceLaunch("decode", command, DECODE, DecodeConfig.metrics_listen, STOP_SECONDS, SECURITY)


def _prefill_launch(namespace: Namespace, options: Mapping[str, str]) -> ServiceLaunch:
    flags = ["--allow-plaintext", f"--decode={DECODE}", *(f"--{name}={value}" for name, value in options.items())]
    command = namespace.command(sys.executable, "-m", PREFILL_MODULE, *flags)
    return ServiceLaunch("prefill", command, PREFILL, PREFILL_METRICS, STOP_SECONDS, SECURITY)
