"""Stands in for a service's main module: the same flags, no model.

`--model` says how it behaves: "serves", "dies" (before it is ready), "crashes" (when a request arrives),
"silent" (never ready), "stubborn" (ignores SIGTERM).
"""

import os
import signal
import sys

from tests.client.fake_servers import FakePrefill, decode_server, prefill_server, stop


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def crash(request, context):
    say("about to crash")
    os._exit(3)


def main() -> None:
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:] if "=" in flag)
    behaviour = flags["model"]
    say("flags: " + " ".join(sys.argv[1:]))
    if behaviour == "dies":
        say("cannot load [the model]")
        sys.exit(5)
    if behaviour == "silent":
        signal.pause()
    asked_to_stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked_to_stop)
    answers = FakePrefill(crash) if behaviour == "crashes" else FakePrefill()
    server = prefill_server(answers) if "decode" in flags else decode_server()
    server.bind(flags["listen"])
    server.start()
    while True:
        say(f"got {signal.Signals(signal.sigwait(asked_to_stop)).name}")
        if behaviour != "stubborn":
            break
    stop(server)
    say("stopped cleanly")


if __name__ == "__main__":
    main()
