"""From a command's flags to a model that is ready to be measured, and the methods to measure."""

import argparse
from dataclasses import dataclass

from rich.console import Console

from spectrumkv.bench.methods.selection import Choice, MethodSelector
from spectrumkv.bench.methods.served_model import Method, ServedModel
from spectrumkv.bench.peers.quanto_extension import QUANTO, expect_extension
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.model.load import LoadedModel, choose_device
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.tuning.basis_cache import EXCERPTS, resolve_basis
from spectrumkv.prefill_server.tuning.probe.probe import resolve_verdict
from spectrumkv.prefill_server.verdict import ProbeVerdict


@dataclass(frozen=True)
class Prepared:
    """What a bench that compares methods needs.

    Attributes:
        served: the model.
        methods: at least one.
    """

    served: ServedModel
    methods: list[Method]


def check_peers(choice: Choice, device: str) -> None:
    """Look, before a model is loaded, whether the peers that are to be measured can run.

    Args:
        choice: of methods.
        device: as `--device` has it.

    Raises:
        SpectrumKVError: there is no such device, or quanto's kernels cannot be loaded now.
    """
    if choice.runs_on(QUANTO):
        expect_extension(choose_device(device), Console(stderr=True, highlight=False))


def prepare(loaded: LoadedModel, choice: Choice, arguments: argparse.Namespace, tokens: int) -> Prepared:
    """Settle the probe's verdict as a prefill service would, make room, and choose methods.

    Args:
        loaded: the model.
        choice: of methods.
        arguments: with the flags of `add_method_flags`.
        tokens: most tokens of a prompt and what follows it.

    Raises:
        InvalidArgumentError: the flags do not fit together or the model.
    """
    console = Console(stderr=True, highlight=False)
    if tokens > loaded.context_length:
        raise InvalidArgumentError(
            f"{tokens} tokens are asked for, and {loaded.name} has a context of {loaded.context_length}; "
            "lower --context"
        )
    config = build(PrefillConfig, {"int4": arguments.int4})
    basis = _basis(loaded, console)
    verdict = _verdict(loaded, config, basis, console)
    served = ServedModel(loaded, config.window, tokens)
    selection = MethodSelector(choice, config, verdict, loaded.spec, served.metrics, basis).select()
    for note in selection.notes:
        console.print(note, markup=False, style="dim")
    return Prepared(served, selection.methods)


def _basis(loaded: LoadedModel, console: Console) -> SpectralBasis:
    def tell(done: int) -> None:
        console.print(f"calibration, excerpt {done} of {EXCERPTS}", markup=False, style="dim")

    return resolve_basis(loaded, tell)


def _verdict(loaded: LoadedModel, config: PrefillConfig, basis: SpectralBasis, console: Console) -> ProbeVerdict:
    engine = PrefillEngine(loaded, config.window)
    try:
        return resolve_verdict(
            loaded, engine, basis, config.int4, lambda step: console.print(str(step), markup=False, style="dim")
        )
    finally:
        engine.stop()
