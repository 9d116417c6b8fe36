"""`vllm-link`: rows from what was observed, what is started, and what is refused before anything starts."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.bench.main import main
from spectrumkv.bench.vllm.link import requests
from spectrumkv.bench.vllm.link.measure import NIXL, pairs_of, rate_rows, settings_of
from spectrumkv.bench.vllm.link.plot import draw
from spectrumkv.bench.vllm.link.requests import Errand, Setting
from spectrumkv.bench.vllm.link.systems import SYSTEMS, Engines, server_command, transfer_config
from spectrumkv.common.errors import FailedPreconditionError

ENGINES = Engines(sys.executable, Path("/model"), 1, Path())


def observed(setting: str, second: float, sent: int) -> dict[str, Any]:
    return {"setting": setting, "arrivals": [second / 2, second, second + 1], "link_bytes": sent}


def test_rows_are_medians_beside_nixl() -> None:
    settings = settings_of(SYSTEMS)
    names = ["one vLLM", "SpectrumKV native", "SpectrumKV 0.5", "SpectrumKV 0.3", NIXL]
    assert [one.name for one in settings] == names
    listed = [observed(name, second, 300) for name in names[:-1] for second in (1.0, 2.0, 9.0)]
    rows = rate_rows(20.0, settings, [*listed, observed(NIXL, 4.0, 1000)])
    assert [(row["ttft_ms"], row["second_token_ms"]) for row in rows] == [(1000, 2000)] * 4 + [(2000, 4000)]
    assert [row["second_token_ms_ratio_to_nixl"] for row in rows] == [0.5, 0.5, 0.5, 0.5, 1]
    assert [row["link_bytes_ratio_to_nixl"] for row in rows] == [0.3, 0.3, 0.3, 0.3, 1]


def test_rows_without_nixl_have_no_ratio() -> None:
    (row,) = rate_rows(20.0, settings_of(("vllm",)), [observed("one vLLM", 1.0, 0)])
    assert (row["second_token_ms_ratio_to_nixl"], row["link_bytes_ratio_to_nixl"]) == (None, None)


@pytest.mark.parametrize(
    ("systems", "pairs"), [(SYSTEMS, ["spectrumkv", "nixl"]), (("vllm",), ["spectrumkv"]), (("nixl",), ["nixl"])]
)
def test_only_pairs_that_are_asked_are_started(systems: tuple[str, ...], pairs: list[str]) -> None:
    assert pairs_of(systems) == pairs


def test_errands_cross_as_json() -> None:
    errand = Errand(settings_of(SYSTEMS), {"nixl": [1, 2]}, ("http://a/health",), 1.0, 2, True, 8, 3, 100)
    assert Errand.from_json(errand.to_json()) == errand


def test_only_one_pair_runs_while_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as running:
        servers = {
            pair: running.enter_context(subprocess.Popen(["sleep", "600"], start_new_session=True))
            for pair in ("spectrumkv", "nixl")
        }
        for one in servers.values():
            running.callback(one.kill)
        asked: list[str] = []

        def ask(setting: Setting, *_: object) -> tuple[float, ...]:
            (other,) = (servers[pair] for pair in servers if pair != setting.pair)
            os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
            assert state(servers[setting.pair].pid) != "T"
            asked.append(setting.name)
            return (1.0, 2.0, 3.0)

        monkeypatch.setattr(requests, "_ask", ask)
        monkeypatch.setattr(requests, "link_bytes_sent", lambda: 7)
        groups = {pair: [one.pid] for pair, one in servers.items()}
        settings = settings_of(SYSTEMS)
        requests.do(Errand(settings, groups, (), 1.0, 2, False, 8, 3, 100))
        assert asked == [one.name for one in (*settings, *settings[::-1])]
        assert [one["setting"] for one in json.loads(capsys.readouterr().out)] == asked
        for one in servers.values():
            os.waitid(os.P_PID, one.pid, os.WCONTINUED)
            assert state(one.pid) != "T"


def state(pid: int) -> str:
    """T where a process is stopped (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("system", "role", "connector", "kv_role"),
    [
        ("spectrumkv", "prefill", "SpectrumKVConnector", "kv_producer"),
        ("spectrumkv", "decode", "SpectrumKVConnector", "kv_consumer"),
        ("nixl", "prefill", "NixlConnector", "kv_both"),
    ],
)
def test_servers_get_their_connector(system: str, role: str, connector: str, kv_role: str) -> None:
    command = server_command(ENGINES, 8100, transfer_config(system, role))
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert (transfer["kv_connector"], transfer["kv_role"]) == (connector, kv_role)


def test_plot_is_written(tmp_path: Path) -> None:
    settings = settings_of(SYSTEMS)
    rows = [
        row
        for rate in (20.0, 200.0)
        for row in rate_rows(rate, settings, [observed(one.name, 1.0, 10) for one in settings])
    ]
    draw(rows, str(tmp_path / "link.svg"), "title")
    assert (tmp_path / "link.svg").stat().st_size > 1000


def test_missing_package_is_named() -> None:
    # vLLM is not installed where tests of benches run.
    with pytest.raises(FailedPreconditionError, match="no package vllm; name the interpreter"):
        ENGINES.check(SYSTEMS)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--systems", "vllm,other"), "--systems has 'other'; allowed: vllm, spectrumkv, nixl"),
        (("--random-output-len", "2"), "--random-output-len is 2; allowed: 3 to 1024"),
        (("--random-input-len", "5000"), "--random-input-len is 5000; allowed: 1 to 4088"),
        (("--rounds", "0"), "--rounds is 0; allowed: 1 to 1000"),
        (("--logs", "/nowhere"), "--logs /nowhere is no folder; make it first"),
    ],
)
def test_arguments_are_checked_first(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], what: str) -> None:
    assert main(["vllm-link", *flags]) == 1
    assert what in " ".join(capsys.readouterr().err.split())
