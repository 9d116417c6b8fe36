"""Stage `streams`: serve several numbers of requests at once on one running pair (see bench/serving)."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from spectrumkv.bench.device.report import StageReport
from spectrumkv.bench.device.scale import CONTENDERS, Scale, kv_choice
from spectrumkv.bench.models.shaped_model import shaped_model_directory
from spectrumkv.bench.report.results import describe_served_model
from spectrumkv.bench.serving.load import Workload, offer
from spectrumkv.bench.serving.metrics import Goodput
from spectrumkv.bench.serving.serve import Contender, measure, spectrum_contender
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.local.pair_config import FREE_PORTS
from spectrumkv.client.local.running_pair import running_pair

# With fewer streams than this, so many requests are served one after another.
FEWEST_REQUESTS = 4
# A level is begun only if this many times what the level before it took is left.
GROWTH = 3.0

Rows = list[dict[str, Any]]


def run(report: StageReport) -> None:
    """Serve every level that there is time for, and report a row for each contender at each.

    Raises:
        SpectrumKVError: a service does not start, or a contender's name is wrong.
    """
    scale = report.settings.scale
    options = {
        **FREE_PORTS,
        "model": str(shaped_model_directory(scale.shape)),
        "device": scale.device,
        # A probe of random weights would say nothing, and takes long.
        "int4": "on",
        "kv_memory": scale.kv_memory,
    }
    with ExitStack() as running:
        pair = running.enter_context(running_pair(options, ready_timeout=report.seconds_left))
        client = running.enter_context(SpectrumClient(pair.address))
        info: Any = client.server_info()
        report.model = describe_served_model(info)
        contenders = [spectrum_contender(client, kv_choice(name)) for name in CONTENDERS]
        serve_levels(report, lambda streams: _serve(contenders, streams, scale, info.model.vocab_size))


def serve_levels(report: StageReport, serve: Callable[[int], Rows]) -> None:
    """Serve one number of streams after another, while there is time.

    Args:
        report: gets the rows, and what failed or was not run.
        serve: serves so many streams, and returns a row for each contender.

    Raises:
        InvalidArgumentError: the report's file cannot be written.
    """
    needed = 0.0
    for streams in report.settings.scale.streams:
        before = report.seconds_left
        if before < needed:
            report.not_run.append(f"{streams} streams: {before:.0f} s are left, and they may take {needed:.0f} s")
            continue
        report.add(serve(streams))
        needed = GROWTH * (before - report.seconds_left)
    report.failures += [
        f"{row['contender']} at {row['streams']} streams: {row['failed']} failed, the first with {row['first_error']}"
        for row in report.rows
        if row["failed"]
    ]


def _serve(contenders: list[Contender], streams: int, scale: Scale, vocab_size: int) -> Rows:
    workload = Workload.random(
        prompts=max(FEWEST_REQUESTS, streams),
        input_tokens=scale.tokens,
        output_tokens=scale.output_tokens,
        rate=None,
        max_concurrency=streams,
        vocab_size=vocab_size,
        seed=streams,
    )
    # Decode captures a CUDA graph when it first meets a number of rows, which must not happen while it is measured.
    warming = replace(workload, prompts=workload.prompts[:streams], arrivals=workload.arrivals[:streams])
    offer(warming, contenders[0].system)
    rows = measure(workload, contenders, scale.stream_rounds, Goodput.parse([]), lambda done: None)
    return [{"streams": streams, "contender": name} | row for name, row in zip(CONTENDERS, rows, strict=True)]
