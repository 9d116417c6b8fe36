"""A service in a process of its own, given options as `name=value`. It echoes Decode streams."""

import logging
import sys

from prometheus_client import CollectorRegistry

from spectrumkv.common.liveness.vitals import Vitals
from spectrumkv.common.service.config import DecodeConfig, build
from spectrumkv.common.service.process import exit_on_error, set_up_logging
from spectrumkv.common.service.serving import serve_until_signalled
from spectrumkv.common.telemetry.metrics import Metrics
from tests.common.rpc.scripted import echo, make_server


def main() -> None:
    options = dict(pair.split("=") for pair in sys.argv[1:])
    config = build(DecodeConfig, {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"} | options)
    set_up_logging(config.log_level)
    server = make_server(echo, stream="Decode")
    serve_until_signalled(
        server,
        Metrics(CollectorRegistry()),
        config,
        stop=lambda: logging.info("engine stopped"),
        vitals=Vitals(),
    )


if __name__ == "__main__":
    exit_on_error(main)
