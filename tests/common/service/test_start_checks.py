"""What is wrong with a service's options is said before anything is loaded."""

import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.service import cgroup, machine
from spectrumkv.common.service.config import Address, DecodeConfig, PrefillConfig, build
from spectrumkv.common.service.process import exit_on_error
from spectrumkv.common.service.start_checks import check_processor, check_start
from spectrumkv.kernels.jit import llvm

FREE = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}


def test_what_can_be_served_passes() -> None:
    check_start(build(DecodeConfig, FREE))
    check_start(build(PrefillConfig, FREE))


def test_more_threads_than_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processors", lambda: 2)
    check_start(build(DecodeConfig, FREE | {"threads": "2"}))
    with pytest.raises(InvalidArgumentError, match=r"--threads is 3, .* keep 2 processors busy; set it lower"):
        check_start(build(DecodeConfig, FREE | {"threads": "3"}))


def test_what_the_service_may_use_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "processors", lambda: 2)
    monkeypatch.setattr(cgroup, "memory_bytes", lambda: 3 << 30)
    with caplog.at_level("INFO"):
        check_start(build(DecodeConfig, FREE))
    assert re.search(r"torch runs \d+ threads; .* 2 processors and 3.00 GiB of memory", caplog.text)


@pytest.mark.parametrize("option", ["listen", "metrics_listen"])
def test_an_address_in_use_is_named(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidArgumentError, match=f"--{option.replace('_', '-')} {address} .*in use"):
            check_start(build(DecodeConfig, FREE | {option: address}))


@pytest.mark.parametrize(("host", "reason"), [("192.0.2.1", "assign"), ("no.such.host.invalid", "resol|known|Name")])
def test_an_address_of_another_machine_is_told_from_one_in_use(host: str, reason: str) -> None:
    config = build(DecodeConfig, FREE | {"listen": f"{host}:50052", "allow_plaintext": True})
    with pytest.raises(InvalidArgumentError, match=reason):
        check_start(config)


def test_a_name_with_an_ipv6_address_only_can_be_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = socket.getaddrinfo

    def resolved(host: str, *more: Any, **options: Any) -> Any:
        return genuine("::1" if host == "six.example" else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    check_start(build(DecodeConfig, FREE | {"listen": "six.example:0", "allow_plaintext": True}))
    with Address("six.example", 0).listener() as listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize(
    "files", [{"token_file": "/nowhere"}, {"tls_cert": "/nowhere", "tls_key": "/nowhere"}], ids=["tokens", "tls"]
)
def test_files_are_read(files: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="/nowhere"):
        check_start(build(DecodeConfig, FREE | files))


@pytest.mark.parametrize("files", [{"decode_token_file": "/nowhere"}, {"tls_ca": "/nowhere"}], ids=["token", "tls"])
def test_files_for_decode_are_read(files: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="/nowhere"):
        ChannelSecurity.to_decode(build(PrefillConfig, FREE | files)).check()


def test_a_processor_that_cannot_run_compiled_code_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llvm, "_features", lambda: {"sse2": True})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(SystemExit, match="F16C"):
        exit_on_error(check_processor)
    for kind, features in (("x86_64", {"f16c": True}), ("x86_64", {"avx512f": True}), ("aarch64", {})):
        monkeypatch.setattr(platform, "machine", lambda kind=kind: kind)
        monkeypatch.setattr(llvm, "_features", lambda features=features: features)
        check_processor()


# A module whose import somebody interrupts, and one that says what Ctrl-C does once it runs.
INTERRUPTED = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
RUNNING = "import signal\ndef main():\n    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"


@pytest.mark.parametrize(
    ("module", "status", "output"), [(INTERRUPTED, -2, ""), (RUNNING, 0, "True\n")], ids=["importing", "running"]
)
def test_ctrl_c_during_imports_is_silent(tmp_path: Path, module: str, status: int, output: str) -> None:
    (tmp_path / "service.py").write_text(module)
    call = "entrypoints._run('spectrumkv-decode', 'service', 'DecodeConfig')"
    code = f"from spectrumkv.common.service import entrypoints; {call}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, output, "")


@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_a_working_directory_that_was_removed_is_named(tmp_path: Path, command: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    call = f"import os; os.rmdir({str(gone)!r}); from spectrumkv.common.service import entrypoints; "
    done = subprocess.run(
        [sys.executable, "-c", f"{call}entrypoints.{command}()"],
        cwd=gone,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: the working directory was removed; start the service in another one\n"


@pytest.mark.parametrize("closed", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("code", "arguments", "status"),
    [
        ("from spectrumkv.common.service.entrypoints import decode; decode()", "--kv-memory lots", 1),
        ("from spectrumkv.common.service.entrypoints import prefill; prefill()", "--check-config --budget 7", 2),
        ("from spectrumkv.common.service.entrypoints import gateway; gateway()", "--tls-cert /x", 1),
        ("import sys; from spectrumkv.client.health import main; sys.exit(main())", "--server 127.0.0.1:1", 1),
    ],
    ids=["decode", "check", "gateway", "health"],
)
def test_an_error_that_nobody_can_be_told_keeps_its_status(
    code: str, arguments: str, status: int, closed: str
) -> None:
    command = [sys.executable, "-c", code, *arguments.split()]
    # Without this variable Python keeps what a full disk did not take, and tries again at its end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    shell = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh"]
    assert subprocess.run([*shell, *command], env=environment, timeout=120, check=False).returncode == status
