"""Run `spectrumkv info`: show what a server serves, its choices and defaults, and whether it is ready."""

import argparse
from collections.abc import Iterator
from itertools import chain

from rich.console import Console

from spectrumkv.client.cli import flags
from spectrumkv.client.cli.output import STDOUT, check_writable, message_as_json, write_json
from spectrumkv.client.cli.tables import facts_table, probe_summary, probe_tables
from spectrumkv.client.client import ServerInfo
from spectrumkv.v1 import decode_pb2, prefill_pb2

# What a policy's budget is relative to FP16, by its kind.
BUDGET_KINDS = {
    prefill_pb2.BUDGET_KIND_BYTES: " of the FP16 bytes",
    prefill_pb2.BUDGET_KIND_TIER_COST: " of the FP16 tier cost",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "info",
        help="show what a server serves",
        description="Show what a prefill or decode server serves; exit with status 0 only if it is ready.",
        allow_abbrev=False,
    )
    flags.add_connection_flags(parser)
    parser.add_argument("--wait", type=flags.parse_seconds, metavar="SECONDS", help="wait until the server is ready")
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON ('-': to stdout, instead of the tables)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Show what a server serves.

    Returns:
        The exit status: 0 if the server is ready, else 1.

    Raises:
        SpectrumKVError: the result cannot be written, or the server cannot be reached, is not a SpectrumKV server, or
            is not ready in time.
    """
    check_writable("--json", arguments.json)
    with flags.connect(arguments) as client:
        if arguments.wait is not None:
            client.wait_until_serving(arguments.wait)
        serving = client.is_serving()
        info = client.server_info()
    if arguments.json != STDOUT:
        _show(Console(), arguments.server, info, serving)
    if arguments.json is not None:
        header = {"server": arguments.server, "service": _service_name(info), "serving": serving}
        # The key of the verdict is `int4_probe` in what `probe --json` writes, too.
        fields = {"int4_probe" if name == "probe" else name: value for name, value in message_as_json(info).items()}
        write_json(header | fields, arguments.json)
    return 0 if serving else 1


def _service_name(info: ServerInfo) -> str:
    return "prefill" if isinstance(info, prefill_pb2.PrefillServiceGetServerInfoResponse) else "decode"


def _show(console: Console, server: str, info: ServerInfo, serving: bool) -> None:
    common = _common_facts(server, info, serving)
    if isinstance(info, decode_pb2.DecodeServiceGetServerInfoResponse):
        console.print(facts_table(chain(common, _slot_facts(info))))
        return
    console.print(facts_table(chain(common, _choice_facts(info))))
    for table in probe_tables(info.probe):
        console.print(table)


def _common_facts(server: str, info: ServerInfo, serving: bool) -> Iterator[tuple[str, str]]:
    model = info.model
    state = "ready" if serving else "NOT ready"
    yield "server", f"{server} ({_service_name(info)} {info.version}), {state}"
    yield "model", f"{info.model_name} on {info.device} in {model.dtype}"
    shape = f"{model.layers} layers, {model.kv_heads} KV heads of {model.head_dim}"
    yield "architecture", f"{model.architecture}: {shape}, context {model.context_length}"
    yield "codecs", ", ".join(f"{codec.name} v{codec.version}" for codec in info.codecs)


def _slot_facts(info: decode_pb2.DecodeServiceGetServerInfoResponse) -> Iterator[tuple[str, str]]:
    yield "slots", f"{info.slots_used:,} of {info.slots_total:,} reserved"
    yield "running", f"{info.requests_running} requests"


def _choice_facts(info: prefill_pb2.PrefillServiceGetServerInfoResponse) -> Iterator[tuple[str, str]]:
    for policy in info.policies:
        kind = BUDGET_KINDS.get(policy.budget_kind, "")
        yield f"policy {policy.name}", f"budget {policy.min_budget:g} to {policy.max_budget:g}{kind}"
    yield "scorers", ", ".join(info.scorers)
    yield "scopes", ", ".join(info.scopes)
    yield "defaults", ", ".join(f"{field.name} {value}" for field, value in info.defaults.ListFields())
    states = dict.fromkeys(info.decode_workers_ejected, " (ejected: it failed one request after another)")
    states |= dict.fromkeys(info.decode_workers_away, " (takes no requests)")
    yield "decode workers", ", ".join(f"{worker}{states.get(worker, '')}" for worker in info.decode_workers)
    if info.kernel_fault:
        yield "codec fixed_rate", f"runs on the CPU: {info.kernel_fault}"
    verdict = info.probe
    yield "INT4", probe_summary(verdict)
    if not verdict.int4_allowed and verdict.int4_layers_off:
        yield "layers without INT4", ", ".join(map(str, verdict.int4_layers_off))
