"""Run `spectrumkv vllm-proxy`: one address for vLLM servers that prefill and vLLM servers that decode."""

import argparse

from spectrumkv.client.cli import flags
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
    parser.add_argument(
        "--prefill",
        action="append",
        required=True,
        metavar="URL",
        help="a prefill server, such as http://127.0.0.1:8100; give it once for each",
    )
    decode = parser.add_mutually_exclusive_group(required=True)
    decode.add_argument(
        "--decode",
        action="append",
        metavar="URL",
        help="a decode server, such as http://127.0.0.1:8200; give it once for each",
    )
    decode.add_argument(
        "--decode-service",
        action="append",
        type=flags.parse_server,
        metavar="HOST:PORT",
        help="a decode service of SpectrumKV's own instead of vLLM's; give it once for each",
    )
    parser.add_argument(
        "--listen", type=Address.parse, default=Address("127.0.0.1", 8000), metavar="HOST:PORT", help="(%(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="sent to the servers; the client's own if not given")
    group = parser.add_argument_group("connections to decode services, and to prefill's connectors for their KV")
    flags.add_security_flags(group, "the one in the address")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C.

    Returns:
        The exit status, 0.

    Raises:
        FailedPreconditionError: aiohttp is not installed.
        InvalidArgumentError: the security of connections to decode services cannot be kept.
    """
    try:
        from spectrumkv.vllm_plugin.proxy.app import Proxy, serve
        from spectrumkv.vllm_plugin.proxy.decode_front import DecodeFront
    except ModuleNotFoundError as error:
        raise FailedPreconditionError(f"{error.name} is not installed; pip install 'spectrumkv[vllm]'") from error
    security = flags.channel_security(arguments)
    fronts = [DecodeFront(address, security) for address in arguments.decode_service or ()]
    decode = tuple(arguments.decode or (one.url for one in fronts))
    proxy = Proxy(tuple(arguments.prefill), decode, arguments.api_key, fronts)
    serve(proxy, arguments.listen.host.strip("[]"), arguments.listen.port)
    return 0
