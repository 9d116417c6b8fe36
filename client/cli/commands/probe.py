"""Run `spectrumkv probe`: find the smallest safe budget for a model, even if a verdict is kept already."""

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spectrumkv.client.cli.output import STDOUT, check_writable, message_as_json, write_json
from spectrumkv.client.cli.tables import probe_summary, probe_tables
from spectrumkv.common.service.config import SCORE_WINDOW, ServerConfig

if TYPE_CHECKING:
    from spectrumkv.common.model.load import LoadedModel
    from spectrumkv.prefill_server.verdict import ProbeVerdict


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "probe",
        help="find the smallest budget that is safe for a model's KV",
        description="Ask a model for needles in long prompts, and have it predict prose, over KV at INT4 and at a "
        "sweep of budgets; keep the verdict for the prefill service's next starts. Exit with status 0 whatever the "
        "verdict.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="NAME", help="local directory or hub name (default: the embedded model)")
    for name, choices in (("device", "auto, cpu, cuda"), ("dtype", "auto, float32, float16, bfloat16")):
        default = getattr(ServerConfig, name)
        parser.add_argument(
            f"--{name}", default=default, metavar="NAME", help=f"one of {choices} (default: {default})"
        )
    parser.add_argument(
        "--codec", default="absmax", metavar="NAME", help="codec that encodes INT4 (default: %(default)s)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON ('-': to stdout, instead of the tables)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Probe the model, and keep and show the verdict.

    Returns:
        The exit status, 0.

    Raises:
        SpectrumKVError: the result cannot be written, the model cannot be loaded or probed, or the codec is unknown
            or has no INT4.
    """
    check_writable("--json", arguments.json)
    # Loading torch and transformers takes seconds, so the other commands do without.
    from spectrumkv.common.kv.codecs.base import codecs
    from spectrumkv.common.model.load import load_model

    # Refuse an unknown codec before the model is loaded.
    codec = codecs.get(arguments.codec)
    loaded = load_model(arguments.model, arguments.device, arguments.dtype)
    verdict = _probe(loaded, codec.name)
    message = verdict.to_proto()
    if arguments.json != STDOUT:
        console = Console()
        console.print(f"INT4 {probe_summary(message)}", markup=False)
        for table in probe_tables(message):
            console.print(table)
    if arguments.json is not None:
        what = {
            "model": loaded.name,
            "device": str(loaded.device),
            "dtype": loaded.spec.dtype,
            "codec": {"name": codec.name, "version": codec.version},
        }
        write_json(what | {"int4_probe": message_as_json(message)}, arguments.json)
    return 0


def _probe(loaded: "LoadedModel", codec: str) -> "ProbeVerdict":
    from spectrumkv.prefill_server.engine.engine import PrefillEngine
    from spectrumkv.prefill_server.tuning.basis_cache import EXCERPTS, resolve_basis
    from spectrumkv.prefill_server.tuning.probe.probe import probe_and_keep
    from spectrumkv.prefill_server.tuning.probe.runner import ProbeStep

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        PrefillEngine(loaded, SCORE_WINDOW) as engine,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task(f"probing {loaded.name}", total=None)

        def show_excerpt(done: int) -> None:
            progress.update(task, total=EXCERPTS, completed=done, description="calibrating the spectral codec")

        def show(step: ProbeStep) -> None:
            progress.update(task, total=step.total, completed=step.number - 1, description=step.doing)

        basis = resolve_basis(loaded, show_excerpt)
        return probe_and_keep(loaded, engine, basis, show, codec)
