"""Start a gateway beside a pair of services, and stop it before them."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from spectrumkv.client.local.running_pair import LogSink, RunningPair
from spectrumkv.client.local.service_process import ServiceLaunch, ServiceProcess
from spectrumkv.common.errors import DeadlineExceededError
from spectrumkv.common.service.config import Address, flag_name

GATEWAY_MODULE = "spectrumkv.gateway"
# It loads no model.
READY_TIMEOUT_SECONDS = 60.0
STOP_SECONDS = 40.0
# What it logs once callers can connect.
_SERVING = "serving HTTP on"


@contextmanager
def running_gateway(
    pair: RunningPair, listen: Address, options: Mapping[str, str], on_line: LogSink
) -> Iterator[None]:
    """Serve HTTP in front of a pair while the block runs.

    Callers' tokens go on to the pair, which checks them.

    Args:
        pair: the services.
        listen: where to serve.
        options: of the gateway, by name, which the pair has in common with it.
        on_line: called with each line that the gateway logs.

    Yields:
        Nothing; callers can connect now.

    Raises:
        UnavailableError: the gateway ended.
        DeadlineExceededError: the gateway was not ready in time.
    """  # the rule wants `death` itself; it makes an UnavailableError
    news: SimpleQueue[bool] = SimpleQueue()

    def follow(line: str) -> None:
        on_line("gateway", line)
        if _SERVING in line:
            news.put(True)

    def ended(service: ServiceProcess) -> None:
        news.put(False)
        pair.report_end(service)

    service = ServiceProcess(_launch(pair, listen, options), follow, ended)
    try:
        if not news.get(timeout=READY_TIMEOUT_SECONDS):
            raise service.death()
        yield
    except Empty:
        raise DeadlineExceededError(f"the gateway was not ready within {READY_TIMEOUT_SECONDS:g} s") from None
    finally:
        service.stop()


def _launch(pair: RunningPair, listen: Address, options: Mapping[str, str]) -> ServiceLaunch:
    tls = pair.security.tls
    given = {"listen": str(listen), "prefill": str(pair.prefill.address.from_here), **options}
    if tls is not None:
        files = {"ca": tls.ca, "cert": tls.cert, "key": tls.key}
        given |= {f"prefill_tls_{name}": str(path) for name, path in files.items() if path is not None}
    flags = [f"{flag_name(name)}={value}" for name, value in given.items()]
    if pair.security.allow_plaintext:
        flags.append(flag_name("allow_plaintext"))
    command = (sys.executable, "-m", GATEWAY_MODULE, *flags)
    return ServiceLaunch("gateway", command, listen, listen, STOP_SECONDS, pair.security)
