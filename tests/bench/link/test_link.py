"""The link bench: rows and stages from what was observed, and namespaces that never outlive it."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.bench.link import network as link_network
from spectrumkv.bench.link.link_command import parse_rates
from spectrumkv.bench.link.measure import SETTINGS, rate_rows, timeline
from spectrumkv.bench.link.network import DECODE_HOST, ShapedLink, shaped_link
from spectrumkv.bench.link.plots import draw_bandwidths, draw_timeline
from spectrumkv.bench.link.requests import SECURITY, Errand, _stage_seconds
from spectrumkv.bench.main import main
from spectrumkv.client.client import SpectrumClient
from spectrumkv.common.errors import DeadlineExceededError, FailedPreconditionError, InternalError
from spectrumkv.common.service.config import Address
from spectrumkv.common.telemetry.metrics import Metrics
from tests.common.security.test_proxies import proxy

can_make_namespaces = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("tc"), reason="needs root, Linux and iproute2"
)


def observed(setting: str, handoff: float, kv_bytes: int) -> dict[str, Any]:
    """A request with its first token after 2 s and gaps of 0.1 s after the hand-off."""
    second = 2.0 + handoff
    return {
        "setting": setting,
        "round": 0,
        "arrivals": [2.0, second, second + 0.1, second + 0.2],
        "ended": second + 0.25,
        "stages": {"queue": 0.0, "prefill": 1.5, "encode": 0.2, "transfer": 2.5},
        "wire": [[0.1, kv_bytes // 1000], [0.5, kv_bytes // 50], [2.4, kv_bytes + 10]],
        "kv_bytes_sent": kv_bytes,
        "budget_counted": 0.5,
        "codec": "absmax" if kv_bytes % 2 else "spectral",
    }


def all_observed() -> list[dict[str, Any]]:
    handoffs = {SETTINGS[0].name: (4.0, 4.2, 9.0), SETTINGS[1].name: (1.0, 1.1, 1.2)}
    return [
        observed(one.name, handoff, 40_000_000)
        for one in SETTINGS
        for handoff in handoffs.get(one.name, (0.4, 0.5, 0.6))
    ]


def test_rows_are_medians_against_the_floor() -> None:
    rows = rate_rows(100.0, 2048, all_observed())
    assert [row["setting"] for row in rows] == [one.name for one in SETTINGS]
    first, overlapped, *_ = rows
    assert first["handoff_ms"] == pytest.approx(4200)
    assert first["handoff_ratio_to_sequential"] == 1.0
    assert overlapped["handoff_ratio_to_sequential"] == pytest.approx(1100 / 4200)
    # 320 Mb take 3.2 s, in frames 66 bytes for every 1448 more; prefill hides 1.5 s of them; one gap more.
    assert overlapped["payload_ms"] == pytest.approx(3200)
    assert overlapped["wire_ms"] == pytest.approx(3200 * 1514 / 1448)
    assert overlapped["handoff_floor_ms"] == pytest.approx(3200 * 1514 / 1448 - 1400)
    assert overlapped["handoff_floor_ratio"] == pytest.approx(1100 / (3200 * 1514 / 1448 - 1400))
    assert overlapped["itl_ms"] == pytest.approx(100)
    assert overlapped["ttft_ms"] == pytest.approx(2000)
    assert [one["handoff_ms"] for one in overlapped["requests"]] == pytest.approx([1000, 1100, 1200])


def test_each_request_has_a_floor_of_its_own() -> None:
    slow, quick = observed(SETTINGS[1].name, 0.2, 40_000_000), observed(SETTINGS[1].name, 2.2, 40_000_000)
    slow["stages"] = slow["stages"] | {"prefill": 3.1}
    quick["stages"] = quick["stages"] | {"prefill": 1.1}
    row = rate_rows(100.0, 2048, [*all_observed()[:3], slow, quick, *all_observed()[6:]])[1]
    wire = 3200 * 1514 / 1448
    floors = [wire - 3000, wire - 1000]
    assert [one["handoff_floor_ms"] for one in row["requests"]] == pytest.approx(floors)
    assert row["handoff_floor_ratio"] == pytest.approx((200 / floors[0] + 2200 / floors[1]) / 2)


def test_a_row_names_every_codec_that_was_used() -> None:
    mixed = [observed(SETTINGS[3].name, 0.4, size) for size in (40_000_000, 40_000_001, 40_000_002)]
    rows = rate_rows(100.0, 2048, [*all_observed()[:9], *mixed])
    assert [row["codecs"] for row in rows] == [["spectral"]] * 3 + [["absmax", "spectral"]]


def test_where_prefill_hides_the_wire_the_floor_is_one_gap() -> None:
    rows = rate_rows(10_000.0, 2048, all_observed())
    assert rows[1]["handoff_floor_ms"] == pytest.approx(100)


def test_stages_of_a_request() -> None:
    stages = timeline(observed("fp16", 0.5, 40_000_000))
    assert stages == {"prefill": (0.0, 2.0), "wire": (0.5, 2.4), "handoff": (2.0, 2.5), "decode": (2.5, 2.75)}


def test_a_wire_that_was_sampled_too_rarely_ends_with_the_second_token() -> None:
    seen = observed("fp16", 0.5, 40_000_000) | {"wire": []}
    assert timeline(seen)["wire"] == (2.5, 2.5)


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [*rate_rows(20.0, 2048, all_observed()), *rate_rows(200.0, 2048, all_observed())]
    draw_bandwidths(rows, str(tmp_path / "bandwidths.png"), "a model")
    draw_timeline(rows[:4], str(tmp_path / "timeline.svg"), "a model")
    assert (tmp_path / "bandwidths.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "timeline.svg").read_text()


def test_an_errand_survives_its_journey() -> None:
    errand = Errand("a:1", "b:2", "c:3", 5.0, SETTINGS, 2, 64, 8, 0)
    assert Errand.from_json(errand.to_json()) == errand


def test_the_bench_goes_past_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.request_duration.labels("queue").observe(2.0)
    port = metrics.serve(Address("127.0.0.1", 0))
    with proxy() as (address, seen):
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, address)
        assert _stage_seconds(f"127.0.0.1:{port}") == {"queue": 2.0}
        with SpectrumClient("192.0.2.1:50052", SECURITY) as decode, pytest.raises(DeadlineExceededError):
            decode.wait_until_serving(0.5)
        assert seen.empty()


@pytest.mark.parametrize("text", ["", "0", "20,fast", "1e9"])
def test_senseless_bandwidths_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: Mb/s"):
        parse_rates(text)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(link_network.sys, "platform", "linux")
    monkeypatch.setattr(link_network.os, "geteuid", lambda: 1000)
    assert main(["link"]) == 1
    assert "takes root" in capsys.readouterr().err


def test_elsewhere_than_on_linux_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_network.sys, "platform", "darwin")
    with pytest.raises(FailedPreconditionError, match="darwin"):
        link_network.check_privileges()


@can_make_namespaces
def test_the_link_is_shaped_and_joins_both_namespaces() -> None:
    with shaped_link() as link:
        link.shape(20e6)
        link.shape(200e6)
        assert "rate 200Mbit" in _output(link.decode.command("tc", "qdisc", "show", "dev", "link0"))
        assert DECODE_HOST in _output(link.prefill.command("ip", "route", "get", DECODE_HOST))
        assert "link0" not in _output(("ip", "-brief", "link"))
    assert not _left_behind(link)


@can_make_namespaces
def test_namespaces_go_when_the_bench_fails() -> None:
    seen: list[ShapedLink] = []

    def fail() -> None:
        with shaped_link() as link:
            seen.append(link)
            link.shape(-1)

    with pytest.raises(InternalError, match="tc"):
        fail()
    assert not _left_behind(seen[0])


def _left_behind(link: ShapedLink) -> list[str]:
    names = _output(("ip", "netns", "list"))
    return [one.name for one in (link.prefill, link.decode) if one.name in names]


def _output(command: tuple[str, ...]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
