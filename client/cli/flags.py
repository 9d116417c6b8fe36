"""The flags that say how to generate and how the KV cache travels: one spelling for every command."""

import argparse

from spectrumkv.client.request import KvChoice, Sampling


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of `Sampling`."""
    group = parser.add_argument_group("sampling (the server's default where not given)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus of this probability, in (0, 1]")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K most likely tokens; 0 is all")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="divides logits of tokens already seen")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same tokens")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)"
    )
    group.add_argument(
        "--stop-token-ids", type=parse_token_ids, default=(), metavar="IDS", help="end at any of these: 1,2,3"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probability of each token and of N alternatives"
    )


def add_kv_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and a flag for each field of `KvChoice`."""
    group = parser.add_argument_group("KV cache (the server's default where not given; see `spectrumkv info`)")
    group.add_argument("--model", metavar="NAME", help="refuse a server of another model")
    group.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="what the KV may cost relative to FP16, above 0 and at most 1 (see `spectrumkv info` for each policy's "
        "range): all bytes sent with policy spectral, with others the mean cost per token without scales and framing",
    )
    group.add_argument("--policy", metavar="NAME", help="how tokens get their tiers")
    group.add_argument("--codec", metavar="NAME", help="how tiers are coded")
    group.add_argument("--scorer", metavar="NAME", help="how tokens are ranked")
    group.add_argument("--scope", metavar="NAME", help="tiers per 'layer' or one for the whole 'model'")


def sampling_from(arguments: argparse.Namespace) -> Sampling:
    """Read the flags of `add_sampling_flags`.

    Raises:
        InvalidArgumentError: a number cannot be carried.
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
    )


def kv_choice_from(arguments: argparse.Namespace) -> KvChoice:
    """Read the flags of `add_kv_flags`, `--model` apart."""
    return KvChoice(
        budget=arguments.budget,
        policy=arguments.policy,
        scorer=arguments.scorer,
        codec=arguments.codec,
        scope=arguments.scope,
    )


def parse_token_ids(text: str) -> tuple[int, ...]:
    """Read "1,2,3".

    Raises:
        argparse.ArgumentTypeError: something in it is not a whole number of at least 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: token ids separated by commas, such as 1,2,3")
    return tuple(int(part) for part in parts)


def parse_seconds(text: str) -> float:
    """Read a positive number of seconds.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a positive number of seconds")
    return seconds
