from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectrumkv.client.cli.commands.up import _announce
from spectrumkv.client.cli.main import build_parser
from spectrumkv.common.security import ChannelSecurity, TlsFiles
from spectrumkv.common.service.config import Address


class Lines(list[str]):
    def write_line(self, line: str) -> None:
        self.append(line)


def announced(listen: str, security: ChannelSecurity) -> list[str]:
    launch = SimpleNamespace(
        name="prefill", address=Address.parse(listen), metrics_address=Address.parse("[::1]:9464")
    )
    pair: Any = SimpleNamespace(prefill=launch, decode=launch, security=security)
    lines: Any = Lines()
    _announce(lines, pair)
    return lines


TLS = TlsFiles(Path("/s/a b.crt"), Path("/s/k.key"), Path("/s/ca.crt"))


@pytest.mark.parametrize(
    ("listen", "security", "command"),
    [
        ("127.0.0.1:50051", ChannelSecurity(), "generate --chat"),
        ("[::1]:50051", ChannelSecurity(), "generate --server '[::1]:50051' --chat"),
        ("[fd00::1]:50051", ChannelSecurity(), "generate --server '[fd00::1]:50051' --allow-plaintext --chat"),
        ("0.0.0.0:50051", ChannelSecurity(), "generate --chat"),
        ("[::]:1234", ChannelSecurity(), "generate --server '[::1]:1234' --chat"),
        (
            "gpu-1:50051",
            ChannelSecurity(TLS, Path("/s/t")),
            "generate --server gpu-1:50051 --tls-ca /s/ca.crt --tls-cert '/s/a b.crt' --tls-key /s/k.key "
            "--token-file /s/t --chat",
        ),
    ],
)
def test_the_command_that_up_suggests_reaches_the_pair(listen: str, security: ChannelSecurity, command: str) -> None:
    first, _, ready = announced(listen, security)
    assert first == f"prefill serves on {listen}, metrics at http://[::1]:9464/metrics"
    assert f"try: spectrumkv {command}" in ready
    words = command.replace("'/s/a b.crt'", "/s/a").replace("'", "").split()
    build_parser().parse_args([*words, "question"])
