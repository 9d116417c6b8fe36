"""Measures vLLM's hand-offs over links of known bandwidth: SpectrumKV beside NIXL and beside one server."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from spectrumkv.bench.link.network import DECODE_HOST, PREFILL_HOST, ShapedLink, shaped_link
from spectrumkv.bench.vllm.link import requests
from spectrumkv.bench.vllm.link.requests import PAIR_OF, Errand, Setting
from spectrumkv.bench.vllm.link.systems import DECODE_PORTS, PREFILL_PORTS, PROXY_PORTS, Engines, running_pair
from spectrumkv.common.errors import UnavailableError

READY_SECONDS = 600.0
BUDGETS = (0.5, 0.3)
NIXL = "NixlConnector"
PAIRS = ("spectrumkv", "nixl")


def pairs_of(systems: Sequence[str]) -> list[str]:
    """Return the pairs that systems need.

    Args:
        systems: of `SYSTEMS`.
    """
    return [pair for pair in PAIRS if any(PAIR_OF[system] == pair for system in systems)]


def settings_of(systems: Sequence[str]) -> tuple[Setting, ...]:
    """Return what is asked, in turn.

    Args:
        systems: of `SYSTEMS`.
    """
    found = []
    if "vllm" in systems:
        found.append(Setting("vllm", "one vLLM", f"http://{PREFILL_HOST}:{PREFILL_PORTS['spectrumkv']}", {}))
    if "spectrumkv" in systems:
        proxy = f"http://{PREFILL_HOST}:{PROXY_PORTS['spectrumkv']}"
        wanted: dict[str, Mapping[str, Any]] = {"native": {"policy": "native"}}
        wanted |= {f"{budget:g}": {"policy": "spectral", "budget": budget} for budget in BUDGETS}
        found += [
            Setting("spectrumkv", f"SpectrumKV {name}", proxy, {"kv_transfer_params": params})
            for name, params in wanted.items()
        ]
    if "nixl" in systems:
        # As behind NIXL's own proxies, decode generates the first token, too: a least length makes our proxy do so.
        found.append(Setting("nixl", NIXL, f"http://{PREFILL_HOST}:{PROXY_PORTS['nixl']}", {"min_tokens": 1}))
    return tuple(found)


def measure(
    systems: Sequence[str],
    engines: Engines,
    megabits: Sequence[float],
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    vocabulary: int,
    on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Ask every system in turn over a link of each bandwidth; one pair runs at a time. Four servers take 16 GB.

    Args:
        systems: of `SYSTEMS`.
        engines: how vLLM is run.
        megabits: bandwidths in 10^6 bits per second.
        prompt_tokens: length of each prompt.
        output_tokens: tokens to generate, 3 or more.
        rounds: at each bandwidth.
        vocabulary: prompts are drawn from so many tokens.
        on_step: called after each bandwidth with a text that names it.

    Returns:
        A row for each bandwidth and setting.

    Raises:
        SpectrumKVError: the link cannot be made, or a server or a request failed.
    """
    settings, pairs = settings_of(systems), pairs_of(systems)
    rows: list[dict[str, Any]] = []
    with shaped_link() as link, ExitStack() as running:
        groups = {pair: running.enter_context(running_pair(pair, engines, link)) for pair in pairs}
        for number, rate in enumerate(megabits):
            link.shape(rate * 1e6)
            errand = Errand(
                settings=settings,
                groups=groups,
                healthy=tuple(url for pair in pairs for url in _health(pair)),
                ready_seconds=READY_SECONDS,
                rounds=rounds,
                warm=number == 0,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                vocabulary=vocabulary,
            )
            rows += rate_rows(rate, settings, _run(link, errand))
            on_step(f"{rate:g} Mb/s")
    return rows


def rate_rows(
    megabits: float, settings: Sequence[Setting], observed: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each setting at one bandwidth, by medians over its requests.

    Args:
        megabits: the bandwidth.
        settings: what was asked.
        observed: `requests.Observed` as JSON, of all settings.
    """
    rows = []
    for setting in settings:
        mine = [one for one in observed if one["setting"] == setting.name]
        first, second = ([one["arrivals"][place] * 1000 for one in mine] for place in (0, 1))
        rows.append(
            {
                "rate_mbps": megabits,
                "system": setting.system,
                "setting": setting.name,
                "ttft_ms": statistics.median(first),
                "second_token_ms": statistics.median(second),
                "link_bytes": statistics.median(one["link_bytes"] for one in mine),
                "requests": [{"arrivals": one["arrivals"], "link_bytes": one["link_bytes"]} for one in mine],
            }
        )
    nixl = next((row for row in rows if row["system"] == "nixl"), None)
    for row in rows:
        for name in ("second_token_ms", "link_bytes"):
            row[f"{name}_ratio_to_nixl"] = None if nixl is None else row[name] / nixl[name]
    return rows


def _health(pair: str) -> tuple[str, ...]:
    ports = ((PREFILL_HOST, PREFILL_PORTS), (DECODE_HOST, DECODE_PORTS), (PREFILL_HOST, PROXY_PORTS))
    return tuple(f"http://{host}:{listed[pair]}/health" for host, listed in ports)


def _run(link: ShapedLink, errand: Errand) -> list[dict[str, Any]]:
    """Do an errand beside prefill.

    Returns:
        `requests.Observed` as JSON.

    Raises:
        UnavailableError: it failed.
    """
    command = link.prefill.command(sys.executable, "-m", requests.__name__)
    done = subprocess.run(  # noqa: S603  # our own interpreter and module
        command, input=errand.to_json(), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise UnavailableError("the requests inside the namespace failed; standard error has their error")
    observed: list[dict[str, Any]] = json.loads(done.stdout)
    return observed
