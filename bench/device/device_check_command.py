"""Run `spectrumkv-bench device-check`: everything that only a GPU can show, in one run of known length."""

import argparse
from pathlib import Path

from rich.console import Console

from spectrumkv.bench.device.report import FAILED, INCOMPLETE, PASSED, result_path
from spectrumkv.bench.device.scale import TINY
from spectrumkv.bench.device.stage import Stage, run_stages, stage_command
from spectrumkv.bench.device.summary import summary_table
from spectrumkv.bench.flags import parse_names
from spectrumkv.bench.report.console import results_console
from spectrumkv.client.cli.output import check_writable
from spectrumkv.client.local.running_pair import stopped_by_signals
from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError

LIMIT_SECONDS = 540.0
STAGES = (
    Stage("kernels", "every Triton kernel against its reference", 120, 20),
    Stage("codec", "codecs ÷ a copy on the device", 60, 15),
    Stage("model", "a model with random weights, unless an earlier run wrote it", 120, 30),
    Stage("timeline", "one hand-off, layer by layer, with and without MPS", 160, 40),
    Stage("streams", "requests at once, served by both services on the one device", 180, 60),
)
RESULTS, TINY_RESULTS = Path("bench/results"), Path("build/device-check")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "device-check",
        help="everything that only a GPU can show, in at most nine minutes",
        description="Compare every kernel with its reference, time codecs against a copy, take a time line of a "
        "4,096-token hand-off layer by layer, and serve 1, 8 and 32 streams of a model with Mistral 7B's shape and "
        "random weights, all on one GPU. Status 1: a stage failed; 3: not everything could be run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="for all stages (default: %(default)g)"
    )
    parser.add_argument(
        "--stages",
        type=parse_names,
        default=tuple(stage.name for stage in STAGES),
        metavar="NAMES",
        help=f"stages to run, separated by commas (default: {','.join(stage.name for stage in STAGES)})",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIRECTORY",
        help=f"directory of the JSON files (default: {RESULTS}; with --tiny {TINY_RESULTS}, which is made)",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="try the check itself with tiny shapes on the CPU, kernels on Triton's interpreter; measures nothing",
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the stages and show what they found.

    Returns:
        The exit status: 0, 1 if a stage failed, 3 if not everything could be run.

    Raises:
        FailedPreconditionError: there is no GPU.
        InvalidArgumentError: a stage is unknown, or the directory cannot be written to.
    """
    stages = _chosen(arguments.stages)
    device_name = "cpu" if arguments.tiny else _gpu_name()
    folder = arguments.results or (TINY_RESULTS if arguments.tiny else RESULTS)
    if arguments.tiny and arguments.results is None:
        folder.mkdir(parents=True, exist_ok=True)
    paths = {stage.name: result_path(folder, stage.name, device_name) for stage in stages}
    for path in paths.values():
        check_writable("--results", str(path))
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with stopped_by_signals():
        outcomes = run_stages(stages, stage_command, paths, arguments.tiny, arguments.limit, console.print)
    results_console().print(summary_table(outcomes, TINY.caveat if arguments.tiny else ""))
    statuses = {outcome.status for outcome in outcomes}
    return FAILED if FAILED in statuses else INCOMPLETE if INCOMPLETE in statuses else PASSED


def _chosen(names: tuple[str, ...]) -> list[Stage]:
    known = [stage.name for stage in STAGES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidArgumentError(f"--stages has {unknown[0]!r}; allowed: {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in names]


def _gpu_name() -> str:
    # Loading torch takes seconds, so --help does without.
    import torch

    if not torch.cuda.is_available():
        raise FailedPreconditionError("no CUDA device is here; --tiny tries the check itself on the CPU")
    return torch.cuda.get_device_name()
