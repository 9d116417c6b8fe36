"""The services run as a user without a name and a home, on a file system that takes no writing, as in a container.

Root makes such a place of this machine, for these processes alone: a mount namespace whose root is read-only, and a
user id that /etc/passwd does not have. The user may read all files, since Python may be installed in root's home.
"""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import plan_launches
from spectrumkv.client.local.running_pair import running_services
from spectrumkv.client.local.service_process import ServiceLaunch
from spectrumkv.client.request import Sampling, TokenIds
from spectrumkv.kernels.jit.cache import CACHE_VARIABLE, cache_directory
from tests.processes.conftest import options
from tests.tiny_models import tiny_model

USER = "12345"
READY_SECONDS = 300.0
# Code that was compiled before: a cache directory of earlier starts has it.
COMPILED = cache_directory() / "compiled"
# $0 is a directory to write to, the cache; the command follows.
SCRIPT = f"""
set -e
mount -t tmpfs -o mode=1777 tmpfs "$0"
if [ -d {COMPILED} ]; then cp -r {COMPILED} "$0"; chown -R {USER}:{USER} "$0"; fi
mount -o remount,ro,bind /
mount -t tmpfs -o ro tmpfs /dev/shm
exec setpriv --reuid={USER} --regid={USER} --clear-groups --no-new-privs \\
    --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search \\
    env -u HOME -u USER -u LOGNAME -u TMPDIR "$@"
"""


def bare(command: tuple[str, ...], writable: Path) -> tuple[str, ...]:
    """The command, on a read-only file system but for a directory, by a user without a name and a home."""
    made = ("unshare", "--mount", "--propagation=private", "sh", "-c", SCRIPT)
    return (*made, str(writable), f"{CACHE_VARIABLE}={writable}", *command)


def why_not() -> str | None:
    """Why no such place can be made here; None where it can."""
    if os.geteuid() != 0:
        return "only root makes a file system read-only for one process"
    if missing := [one for one in ("unshare", "setpriv", "mount") if shutil.which(one) is None]:
        return f"{', '.join(missing)} is not installed"
    tried = subprocess.run(bare(("true",), Path("/mnt")), capture_output=True, text=True, check=False, timeout=60)
    return tried.stderr.strip() or None


NOT_HERE = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NOT_HERE is not None, reason=NOT_HERE or "")]


@contextmanager
def bare_pair(writable: Path, log: list[str]) -> Iterator[str]:
    """Both services there; yields prefill's address. Only the tests' own user may read what it has written."""
    decode, prefill = (made_bare(launch, writable) for launch in plan_launches(options(tiny_model("llama"))))
    with running_services(decode, prefill, lambda name, line: log.append(f"{name} {line}"), READY_SECONDS) as pair:
        yield pair.address


def made_bare(launch: ServiceLaunch, writable: Path) -> ServiceLaunch:
    return replace(launch, command=bare(launch.command, writable))


@pytest.mark.timeout(900)
def test_they_serve(tmp_path: Path) -> None:
    log: list[str] = []
    with bare_pair(tmp_path, log) as address, SpectrumClient(address) as client:
        sampling = Sampling(max_tokens=8, ignore_eos=True)
        completion = client.generate(TokenIds(tuple(range(100, 140))), sampling=sampling, timeout=60).result()
        assert len(completion.tokens) == 8
        processes = [int(name) for name in os.listdir("/proc") if name.isdecimal() and runs_as(int(name), USER)]
        assert len(processes) == 2
    assert [line for line in log if "Traceback" in line] == []
    assert list(tmp_path.iterdir()) == [], "the services write to a file system of their own"


def runs_as(pid: int, user: str) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        # It has ended.
        return False
    return next(line.split()[1:] for line in lines if line.startswith("Uid:")) == [user] * 4


def test_the_user_has_no_name() -> None:
    with pytest.raises(KeyError):
        pwd.getpwuid(int(USER))
