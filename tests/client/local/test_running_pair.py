import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spectrumkv.client.cli.main import main
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local import pair_config
from spectrumkv.client.local.pair_config import FREE_PORTS, SEARCHED_PORTS, plan_launches
from spectrumkv.client.local.running_pair import running_pair, running_services
from spectrumkv.common.errors import DeadlineExceededError, InvalidArgumentError, UnavailableError
from spectrumkv.common.service.serving import STOP_SECONDS

HERE = Path(__file__).parent
UP = (
    "import sys; from spectrumkv.client.local import pair_config as p; "
    "p.DECODE_MODULE = p.PREFILL_MODULE = 'fake_service'; "
    "from spectrumkv.client.cli.main import main; sys.exit(main(sys.argv[1:]))"
)
ANY_PORTS = [f"--{name.replace('_', '-')}={address}" for name, address in FREE_PORTS.items()]


@pytest.fixture(autouse=True)
def fake_services(monkeypatch):
    monkeypatch.setattr(pair_config, "DECODE_MODULE", "fake_service")
    monkeypatch.setattr(pair_config, "PREFILL_MODULE", "fake_service")
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)


@pytest.fixture
def log():
    return []


def pair(log, **options):
    return running_pair({**FREE_PORTS, **options}, lambda name, line: log.append((name, line)), ready_timeout=30)


def test_both_serve_and_both_stop_prefill_first(log):
    with pair(log, model="serves") as both:
        addresses = [both.address, str(both.decode.address)]
        for address in addresses:
            with SpectrumClient(address) as client:
                assert client.is_serving()
        with SpectrumClient(both.address) as client:
            assert client.generate("x").result().text == "Blue sky!"
    assert [name for name, line in log if line == "stopped cleanly"] == ["prefill", "decode"]
    for address in addresses:
        with SpectrumClient(address) as client, pytest.raises(UnavailableError):
            client.is_serving()


def test_each_service_gets_its_own_options_and_prefill_finds_decode(log):
    with pair(log, model="serves", kv_memory="64MiB", budget="0.3", grace="5", reflection=True) as both:
        pass
    given = {name: line.split()[1:] for name, line in log if line.startswith("flags:")}
    assert "--kv-memory=64MiB" in given["decode"]
    assert "--budget=0.3" in given["prefill"]
    assert not any(flag.startswith(("--budget", "--decode")) for flag in given["decode"])
    assert not any(flag.startswith(("--kv-memory", "--decode-metrics")) for flag in given["prefill"])
    assert f"--decode={both.decode.address}" in given["prefill"]
    for launch in (both.decode, both.prefill):
        flags = given[launch.name]
        assert {"--grace=5", "--reflection", f"--listen={launch.address}"} <= set(flags)
        assert f"--metrics-listen={launch.metrics_address}" in flags
        assert launch.stop_seconds > 5 + STOP_SECONDS, "a service that hangs ends by itself"
    ports = [launch.port for one in (both.decode, both.prefill) for launch in (one.address, one.metrics_address)]
    assert len(set(ports)) == 4
    assert 0 not in ports


def test_a_service_that_dies_at_the_start_is_named_with_its_last_lines(log):
    died = pytest.raises(UnavailableError, match=r"(decode|prefill) service ended with status 5")
    with died as caught, pair(log, model="dies"):
        raise AssertionError("it cannot be ready")
    assert "cannot load [the model]" in caught.value.message


def test_the_other_is_stopped_when_one_dies_at_the_start(log):
    decode, prefill = plan_launches({**FREE_PORTS, "model": "serves"})
    dying = replace(prefill, command=tuple(part.replace("serves", "dies") for part in prefill.command))
    pair = running_services(decode, dying, lambda name, line: log.append((name, line)), ready_timeout=30)
    with pytest.raises(UnavailableError, match="prefill service ended with status 5"), pair:
        raise AssertionError("it cannot be ready")
    assert ("prefill", "stopped cleanly") not in log
    with SpectrumClient(str(decode.address)) as client, pytest.raises(UnavailableError):
        client.is_serving()


def test_a_service_that_dies_later_is_named_and_the_other_stopped(log):
    died = pytest.raises(UnavailableError, match=r"prefill service ended with status 3(?s:.*)about to crash")
    with died, pair(log, model="crashes") as both:
        with SpectrumClient(both.address) as client, pytest.raises(UnavailableError):
            client.generate("x").result()
        both.wait_for_death()
    assert ("decode", "stopped cleanly") in log


def test_a_service_killed_by_a_signal_says_which():
    decode, prefill = plan_launches({**FREE_PORTS, "model": "serves"})
    suicide = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    pair = running_services(replace(decode, command=suicide), prefill, lambda name, line: None, 30)
    with pytest.raises(UnavailableError, match=r"decode service was ended by signal 9(?s:.*)\(nothing\)"), pair:
        raise AssertionError("it cannot be ready")


def test_not_ready_in_time():
    options = {**FREE_PORTS, "model": "silent"}
    with pytest.raises(DeadlineExceededError, match="not ready after"), running_pair(options, ready_timeout=0.5):
        raise AssertionError("it cannot be ready")


def test_a_service_that_ignores_sigterm_is_killed(log):
    launches = [replace(one, stop_seconds=0.2) for one in plan_launches({**FREE_PORTS, "model": "stubborn"})]
    with running_services(*launches, lambda name, line: log.append((name, line)), ready_timeout=30):
        pass
    killed = [name for name, line in log if line == "still running 0.2 s after SIGTERM; killed"]
    assert killed == ["prefill", "decode"]


def test_an_error_in_the_block_still_stops_both(log):
    with pytest.raises(ZeroDivisionError), pair(log, model="serves"):
        raise ZeroDivisionError
    assert [name for name, line in log if line == "stopped cleanly"] == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "7"}, r"--budget is '7'"),
        ({"kv_memory": "lots"}, r"--kv-memory is 'lots'"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"decode": "127.0.0.1:1,127.0.0.1:2"}, "one address"),
        ({"decode": "0.0.0.0:0"}, "allow-plaintext"),
    ],
)
def test_options_that_are_not_allowed_are_refused_before_anything_starts(options, said):
    with pytest.raises(InvalidArgumentError, match=said):
        plan_launches({**FREE_PORTS, **options})


def test_an_address_in_use_is_refused_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidArgumentError, match=f"cannot listen on {address}"):
            plan_launches({**FREE_PORTS, "listen": address})


def test_ports_are_found_once_and_where_nothing_else_gets_one():
    launches = [launch for _ in range(20) for launch in plan_launches(FREE_PORTS)]
    ports = [address.port for launch in launches for address in (launch.address, launch.metrics_address)]
    assert len(set(ports)) == len(ports)
    assert set(ports) <= set(SEARCHED_PORTS)


def test_any_port_of_an_address_that_is_not_ours():
    with pytest.raises(InvalidArgumentError, match=r"cannot listen on 203\.0\.113\.1:0: Cannot assign"):
        plan_launches({**FREE_PORTS, "listen": "203.0.113.1:0", "allow_plaintext": True})


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_until_a_signal(signum):
    command = [sys.executable, "-c", UP, "up", "--model=serves", *ANY_PORTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        shown = []
        for line in process.stdout:
            shown.append(line)
            if line.startswith("ready;"):
                break
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert re.fullmatch(r"decode serves on 127.0.0.1:\d+, metrics at http://127.0.0.1:\d+/metrics\n", shown[0])
    assert "spectrumkv generate --server 127.0.0.1:" in shown[-1]
    assert out.endswith("both services have stopped\n")
    assert err.count("stopped cleanly") == 2
    # Only our SIGTERM reaches the services, whatever reached the parent.
    assert "got SIGINT" not in err


def test_up_interrupted_before_both_are_ready():
    command = [sys.executable, "-c", UP, "up", "--model=silent", *ANY_PORTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children = [process.stderr.readline(), process.stderr.readline()]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert all("flags:" in line for line in children)
    assert (process.returncode, out) == (130, "stopped before both services were ready\n"), err


def test_up_names_the_service_that_died(capsys):
    assert main(["up", "--model=dies", *ANY_PORTS]) == 1
    err = capsys.readouterr().err
    assert re.search(
        r"^UNAVAILABLE: the (decode|prefill) service ended with status 5; its last log lines:$", err, re.M
    )
    assert "cannot load [the model]" in err


def test_demo_compares_three_budgets(capfd):
    assert main(["demo", "--model", "serves"]) == 0
    out, err = capfd.readouterr()
    assert out.count("Blue sky!") == 3
    assert "decode | flags:" in err
    assert "stopped cleanly" not in err
    for shown in ("budget 1, fp16 policy", "budget 0.5, default", "budget 0.3, default", "0.562", "0.01", "int8 36"):
        assert shown in out


def test_demo_that_fails_shows_the_services_last_words(capfd):
    assert main(["demo", "--model", "crashes"]) == 1
    err = capfd.readouterr().err
    assert "prefill | about to crash" in err
    assert "UNAVAILABLE: " in err
