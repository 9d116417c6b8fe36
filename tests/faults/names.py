"""Names whose addresses tests decide: for services a file in place of name servers, for gRPC a small name server."""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Ours end so; every other name is looked up as ever.
DOMAIN = ".pods"
_ADDRESS_RECORD, _INTERNET = 1, 1


def say(directory: Path, name: str, hosts: Sequence[str]) -> None:
    """Have services that log into `directory` find these IPv4 addresses for a name; with none it does not resolve."""
    written = directory / f"{name}.written"
    written.write_text(json.dumps(list(hosts)))
    written.rename(directory / name)


def install(directory: Path) -> None:
    """Have this process look up our names in files of `directory`."""
    look_up = socket.getaddrinfo

    def from_file(host: Any, port: Any, *arguments: Any, **named: Any) -> Any:
        if not str(host).endswith(DOMAIN):
            return look_up(host, port, *arguments, **named)
        path = directory / str(host)
        hosts = json.loads(path.read_text()) if path.exists() else []
        if not hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in hosts]

    socket.getaddrinfo = from_file


class NameServer:
    """Answers questions for IPv4 addresses over UDP with `hosts`, whatever the name."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = tuple(hosts)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator["NameServer"]:
        self._thread.start()
        try:
            yield self
        finally:
            # The thread waits for a message.
            self._socket.sendto(b"", self._socket.getsockname())
            self._thread.join()
            self._socket.close()

    def _serve(self) -> None:
        while True:
            question, asker = self._socket.recvfrom(2048)
            if not question:
                return
            # RFC 1035, 4.1: a header of 12 bytes, the name's labels up to an empty one, type and class.
            end = question.index(b"\0", 12) + 5
            (kind,) = struct.unpack(">H", question[end - 4 : end - 2])
            hosts = self.hosts if kind == _ADDRESS_RECORD else ()
            header = struct.pack(">HHHHH", 0x8180, 1, len(hosts), 0, 0)
            # Each record's name points to that of the question; it is good for 0 seconds.
            record = b"\xc0\x0c" + struct.pack(">HHIH", _ADDRESS_RECORD, _INTERNET, 0, 4)
            records = b"".join(record + socket.inet_aton(host) for host in hosts)
            self._socket.sendto(question[:2] + header + question[12:end] + records, asker)
