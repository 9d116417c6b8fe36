"""Prepare a measurement: turn a command's flags into a model in both roles and the methods to run on it."""

import argparse
from dataclasses import dataclass

from rich.console import Console

from spectrumkv.bench.methods.method import Method
from spectrumkv.bench.methods.selection import Choice, MethodSelector
from spectrumkv.bench.methods.served_model import ServedModel
from spectrumkv.bench.peers.quanto import QUANTO, expect_extension
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.model.load import LoadedModel, choose_device
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.prefill_server.tuning.basis_cache import EXCERPTS, resolve_basis
from spectrumkv.prefill_server.tuning.probe.probe import resolve_verdict
from spectrumkv.prefill_server.verdict import ProbeVerdict


@dataclass(frozen=True)
class Prepared:
    """Hold what a bench of methods needs.

    Attributes:
        served: the model.
        methods: the methods, at least one.
    """

    served: ServedModel
    methods: list[Method]


def check_peers(choice: Choice, device: str) -> None:
    """Check, before a model is loaded, that the chosen baselines can run.

    Args:
        choice: the chosen methods.
        device: the value of `--device`.

    Raises:
        SpectrumKVError: there is no such device, or quanto's kernels cannot be loaded now.
    """
    if choice.runs_on(QUANTO):
        expect_extension(choose_device(device), Console(stderr=True, highlight=False))


def prepare(loaded: LoadedModel, choice: Choice, arguments: argparse.Namespace, tokens: int) -> Prepared:
    """Get the basis and the probe's verdict as a prefill service would, make a pool, and select the methods.

    Args:
        loaded: the model.
        choice: the chosen methods.
        arguments: values of the flags of `add_method_flags`.
        tokens: largest number of tokens of a prompt and what follows it.

    Returns:
        The model in both roles, and the methods.

    Raises:
        InvalidArgumentError: the flags contradict each other, or do not fit the model.
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


def _basis(loaded: LoadedModel, console: Console) -> Basis:
    def tell(done: int) -> None:
        console.print(f"calibration, excerpt {done} of {EXCERPTS}", markup=False, style="dim")

    return resolve_basis(loaded, tell)


def _verdict(loaded: LoadedModel, config: PrefillConfig, basis: Basis, console: Console) -> ProbeVerdict:
    with PrefillEngine(loaded, config.window) as engine:
        return resolve_verdict(
            loaded, engine, basis, config.int4, lambda step: console.print(str(step), markup=False, style="dim")
        )
