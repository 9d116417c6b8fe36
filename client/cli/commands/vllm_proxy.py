"""Run `spectrumkv vllm-proxy`: one address for vLLM servers that prefill and vLLM servers that decode."""

import argparse

from spectrumkv.common.errors import FailedPreconditionError
from spectrumkv.common.service.options import Address


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "vllm-proxy",
        help="serve vLLM's API over vLLM servers that carry KV with SpectrumKVConnector",
        description="Send each prompt to a prefill server, and its KV and first token to a decode server. "
        "docs/vllm.md has the commands of the servers.",
        allow_abbrev=False,
    )
    for role in ("prefill", "decode"):
        parser.add_argument(
            f"--{role}",
            action="append",
            required=True,
            metavar="URL",
            help=f"a {role} server, such as http://127.0.0.1:8100; give it once for each",
        )
    parser.add_argument(
        "--listen", type=Address.parse, default=Address("127.0.0.1", 8000), metavar="HOST:PORT", help="(%(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="sent to the servers; the client's own if not given")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C.

    Returns:
        The exit status, 0.

    Raises:
        FailedPreconditionError: aiohttp is not installed.
    """
    try:
        from spectrumkv.vllm_plugin.proxy.app import Proxy, serve
    except ModuleNotFoundError as error:
        raise FailedPreconditionError(f"{error.name} is not installed; pip install 'spectrumkv[vllm]'") from error
    proxy = Proxy(tuple(arguments.prefill), tuple(arguments.decode), arguments.api_key)
    serve(proxy, arguments.listen.host.strip("[]"), arguments.listen.port)
    return 0
