"""Define the flags that commands share: which server, how tokens are sampled, how the KV cache is sent."""

import argparse
import math
from pathlib import Path

from spectrumkv.client.argument_types import LONGEST_TIMEOUT_SECONDS
from spectrumkv.client.client import SpectrumClient
from spectrumkv.client.request import KvChoice, Sampling
from spectrumkv.client.structured_output import StructuredOutput
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.budget import BUDGET_MEANING
from spectrumkv.common.rpc.targets import Target
from spectrumkv.common.security import SYSTEM_ROOTS, ChannelSecurity, TlsFiles

DEFAULT_SERVER = "127.0.0.1:50051"


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `Sampling`."""
    group = parser.add_argument_group("sampling (the server's default where not given)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="generate at most N tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="sampling temperature; 0 is greedy")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the smallest set of tokens with a probability of P, in (0, 1]",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; 0 is all")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="divide the logits of tokens already seen by R"
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the sampling; the same seed gives the same tokens from KV coded the same way",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text (repeatable)"
    )
    group.add_argument(
        "--stop-token-ids", type=parse_token_ids, default=(), metavar="IDS", help="stop at any of these tokens: 1,2,3"
    )
    group.add_argument("--ignore-eos", action="store_true", help="continue after the end-of-sequence token")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="report the log-probability of each token and of N alternatives"
    )
    group.add_argument(
        "--presence-penalty", type=float, metavar="X", help="subtract X from the logits of tokens generated before"
    )
    group.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="subtract X for each time that a token was generated"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="sample from tokens at least P times as likely as the likeliest"
    )
    group.add_argument(
        "--logit-bias", type=parse_logit_bias, default={}, metavar="BIAS", help="add to logits: 11:-100,12:2.5"
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="do not end before N tokens")
    group.add_argument(
        "--bad-word", action="append", default=[], metavar="TEXT", help="do not generate this text (repeatable)"
    )
    group.add_argument("--n", type=int, metavar="N", help="generate N answers; answer i has the seed + i")


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each form of `StructuredOutput`, of which one may be given."""
    title = "form of the answer (any where none is given)"
    group = parser.add_argument_group(title).add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="JSON of the schema in FILE")
    group.add_argument("--json-object", action="store_true", help="any JSON object")
    group.add_argument("--regex", metavar="REGEX", help="a text that the expression matches as a whole")
    group.add_argument("--grammar", metavar="FILE", help="a text of the grammar in FILE, in Lark's notation")
    group.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts (repeatable)")


def add_kv_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and a flag for each field of `KvChoice`."""
    group = parser.add_argument_group("KV cache (the server's default where not given; see `spectrumkv info`)")
    group.add_argument("--model", metavar="NAME", help="refuse a server that serves another model")
    group.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="what the KV may cost relative to FP16, above 0 and at most 1 (see `spectrumkv info` for each policy's "
        f"range): {BUDGET_MEANING}",
    )
    group.add_argument("--policy", metavar="NAME", help="policy that gives tokens their tiers")
    group.add_argument("--codec", metavar="NAME", help="codec that encodes the tiers")
    group.add_argument("--scorer", metavar="NAME", help="scorer that ranks the tokens")
    group.add_argument(
        "--scope", metavar="NAME", help="'layer': each layer has its own tiers; 'model': all layers share them"
    )


def sampling_from(arguments: argparse.Namespace) -> Sampling:
    """Return the sampling that the flags of `add_sampling_flags` describe.

    Raises:
        InvalidArgumentError: a number is negative or too large for the message.
    """
    return Sampling(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        stop_token_ids=arguments.stop_token_ids,
        ignore_eos=arguments.ignore_eos,
        logprobs=arguments.logprobs,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        min_p=arguments.min_p,
        logit_bias=arguments.logit_bias,
        min_tokens=arguments.min_tokens,
        bad_words=tuple(arguments.bad_word),
        n=arguments.n,
    )


def form_from(arguments: argparse.Namespace) -> StructuredOutput | None:
    """Return the form that the flags of `add_form_flags` describe; None where none was given.

    Raises:
        InvalidArgumentError: a file cannot be read.
    """
    forms = {
        "json_schema": arguments.json_schema and _read("--json-schema", arguments.json_schema),
        "json_object": arguments.json_object or None,
        "regex": arguments.regex,
        "grammar": arguments.grammar and _read("--grammar", arguments.grammar),
        "choice": arguments.choice and tuple(arguments.choice),
    }
    given = {name: form for name, form in forms.items() if form is not None}
    return StructuredOutput(**given) if given else None


def _read(flag: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{flag} {file}: {error}; give readable UTF-8 text") from error


def kv_choice_from(arguments: argparse.Namespace) -> KvChoice:
    """Return the KV choice that the flags of `add_kv_flags` describe."""
    return KvChoice(
        budget=arguments.budget,
        policy=arguments.policy,
        scorer=arguments.scorer,
        codec=arguments.codec,
        scope=arguments.scope,
    )


def parse_token_ids(text: str) -> tuple[int, ...]:
    """Return the token ids in a text such as "1,2,3".

    Raises:
        argparse.ArgumentTypeError: an id is not a whole number of at least 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: token ids separated by commas, such as 1,2,3")
    return tuple(int(part) for part in parts)


def parse_logit_bias(text: str) -> dict[int, float]:
    """Return the numbers by token id in a text such as "11:-100,12:2.5".

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token_id): float(value) for token_id, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: numbers by token id: 11:-100,12:2.5") from None


def parse_seconds(text: str) -> float:
    """Return the positive number of seconds in a text; infinity is no limit.

    Raises:
        argparse.ArgumentTypeError: the text is not such a number.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not (0.0 < seconds <= LONGEST_TIMEOUT_SECONDS or seconds == math.inf):
        raise argparse.ArgumentTypeError(
            f"{text!r}; allowed: a positive number of seconds up to {LONGEST_TIMEOUT_SECONDS:g}, or inf for no limit"
        )
    return seconds


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--server` and the flags that secure the connection."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--server",
        type=parse_server,
        default=DEFAULT_SERVER,
        metavar="HOST:PORT",
        help="the server to talk to, or numeric addresses of several, separated by commas (default: %(default)s)",
    )
    add_security_flags(group, "the one in --server")


def add_security_flags(group: "argparse._ArgumentGroup", own_name: str) -> None:
    """Add the flags that secure a connection.

    Args:
        group: of the flags.
        own_name: whose name a server's certificate must carry where no flag says.
    """
    group.add_argument(
        "--tls-ca",
        metavar="FILE",
        help=f"use TLS; PEM file of the authority of the server's certificate ('{SYSTEM_ROOTS}': a public one)",
    )
    group.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM file of a certificate to show to the server"
    )
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file of that certificate's private key")
    group.add_argument(
        "--tls-name",
        metavar="NAME",
        help=f"the name that the server's certificate must carry (default: {own_name})",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the bearer token to send (default: the environment variable SPECTRUMKV_TOKEN, if set)",
    )
    group.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="allow connections to other machines without encryption if --tls-ca is not given",
    )


def connect(arguments: argparse.Namespace) -> SpectrumClient:
    """Return a client for the server that the flags name.

    Raises:
        InvalidArgumentError: the flags contradict each other, a file cannot be used, or plaintext is not allowed.
    """
    return SpectrumClient(arguments.server, channel_security(arguments))


def channel_security(arguments: argparse.Namespace) -> ChannelSecurity:
    """Return the security of a channel that the flags describe.

    Raises:
        InvalidArgumentError: the flags contradict each other.
    """
    tls = None
    if arguments.tls_ca is not None:
        ca = None if arguments.tls_ca == SYSTEM_ROOTS else Path(arguments.tls_ca)
        tls = TlsFiles(arguments.tls_cert, arguments.tls_key, ca)
    elif arguments.tls_cert is not None or arguments.tls_key is not None:
        raise InvalidArgumentError(
            f"--tls-cert and --tls-key need TLS; name the authority with --tls-ca: '{SYSTEM_ROOTS}' or a file"
        )
    return ChannelSecurity(
        tls,
        arguments.token_file,
        allow_plaintext=arguments.allow_plaintext,
        server_name=arguments.tls_name,
    )


def parse_server(text: str) -> str:
    """Return a text that is "host:port" or several addresses separated by commas.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    try:
        return str(Target.parse(text))
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(error.message) from None
