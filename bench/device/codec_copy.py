"""Stage `codec`: time every codec of tiers, and the kernels alone, against a copy on the device (see bench/codec)."""

import torch
from rich.console import Console

from spectrumkv.bench.codec.measure import measure
from spectrumkv.bench.codec.under_test import add_ratios_to_quanto, kernels_under_test, registered_codecs
from spectrumkv.bench.device.report import StageReport
from spectrumkv.bench.models.synthetic_prompt import SyntheticCache
from spectrumkv.bench.report.console import progress


def run(report: StageReport) -> None:
    """Time all in turn, and report a row for each codec and tier. quanto is left out: it compiles for minutes."""
    scale = report.settings.scale
    cache = SyntheticCache.random(scale.geometry, scale.tokens, torch.device(scale.device))
    under_test = [*kernels_under_test(cache), *registered_codecs(cache)]
    with progress(scale.codec_rounds + 1, Console(stderr=True)) as on_round:
        rows = measure(cache, under_test, scale.codec_rounds, on_round)
    add_ratios_to_quanto(rows)
    report.add(rows)
