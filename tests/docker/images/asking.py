"""Asks a service by name until SIGTERM, from a container of its network: `python asking.py prefill:50051 THREADS`.

It prints how many requests it sent, and what those that failed ended with, as JSON.
"""

import json
import signal
import sys
import threading

from spectrumkv.client import Sampling, SpectrumClient
from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.security import ChannelSecurity


def main() -> None:
    server, threads = sys.argv[1], int(sys.argv[2])
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: over.set())
    errors: list[str] = []
    answered: list[int] = []
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)

    def ask() -> None:
        while not over.is_set():
            try:
                answer = client.generate("The precision spectrum " * 8, sampling=sampling).result()
                answered.append(len(answer.token_ids))
            except SpectrumKVError as error:
                errors.append(f"{error.code}: {error.message}")

    with SpectrumClient(server, ChannelSecurity(allow_plaintext=True)) as client:
        workers = [threading.Thread(target=ask) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    sys.stdout.write(json.dumps({"answered": len(answered), "tokens": sorted(set(answered)), "errors": errors}))


if __name__ == "__main__":
    main()
