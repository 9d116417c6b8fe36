"""Define the command-line flags that benches share: model, methods, KV options, shape of a cache, output files."""

import argparse
from typing import TYPE_CHECKING

from spectrumkv.common.kv.budget import BUDGET_MEANING
from spectrumkv.common.service.config import PrefillConfig

if TYPE_CHECKING:
    from spectrumkv.client.request import KvChoice
    from spectrumkv.common.kv.geometry import KvGeometry

# The name of the servers' default policy in `--policies`.
DEFAULT = "default"
DEFAULT_BUDGETS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--device` and `--dtype`."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="local directory or hub name (default: the embedded model)")
    for name, choices in (("device", "auto, cpu, cuda"), ("dtype", "auto, float32, float16, bfloat16")):
        default = getattr(PrefillConfig, name)
        group.add_argument(
            f"--{name}", default=default, metavar="NAME", help=f"one of {choices} (default: {default})"
        )


def add_number_flags(
    parser: "argparse.ArgumentParser | argparse._ArgumentGroup", *numbers: tuple[str, int, str]
) -> None:
    """Add flags that take whole numbers.

    Args:
        parser: gets the flags.
        numbers: of each flag the name, the default, and what it counts.
    """
    for name, default, what in numbers:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")


def given_options(arguments: argparse.Namespace, *names: str) -> dict[str, str]:
    """Return those of the named flags that are set, as options of the services."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def add_json_flag(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add `--json`."""
    parser.add_argument(
        "--json", metavar="FILE", help="write the rows as JSON ('-': to stdout, instead of the table)"
    )


def add_output_flags(parser: argparse.ArgumentParser, plot: str) -> None:
    """Add `--json` and `--plot`.

    Args:
        parser: gets the flags.
        plot: the help text of `--plot`.
    """
    group = parser.add_argument_group("output")
    add_json_flag(group)
    group.add_argument("--plot", metavar="FILE", help=f"{plot} (.png, .svg or .pdf)")


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select methods in quality benches: `--policies`, `--budgets` and the options beside them."""
    group = parser.add_argument_group("methods")
    group.add_argument(
        "--policies",
        type=parse_names,
        default=("all",),
        metavar="NAMES",
        help="policies and baselines, separated by commas, optionally with a codec after a colon (greedy:absmax); "
        "'all' is every one, 'default' what the servers use (default: all)",
    )
    group.add_argument(
        "--budgets",
        type=parse_budgets,
        metavar="NUMBERS",
        help=f"budgets relative to FP16, separated by commas: {BUDGET_MEANING}, as baselines do. A method skips the "
        "budgets that it cannot keep "
        f"(default: {','.join(f'{one:g}' for one in DEFAULT_BUDGETS)}; for 'default' the servers')",
    )
    for name, what in (("codec", "codecs"), ("scorer", "scorers"), ("scope", "scopes")):
        group.add_argument(
            f"--{name}",
            type=parse_names,
            default=("",),
            metavar="NAMES",
            help=f"{what}, separated by commas; every policy runs with each (default: the servers')",
        )
    group.add_argument(
        "--int4",
        default=PrefillConfig.int4,
        metavar="WHEN",
        help="whether adaptive policies may use INT4: auto (ask the probe), on, off (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random draws (default: %(default)s)")


def add_kv_flags(parser: argparse.ArgumentParser, policies: tuple[str, ...], budgets: tuple[float, ...]) -> None:
    """Add the flags that say how speed benches send the KV cache, with several policies and budgets in one run.

    Args:
        parser: gets `--policies`, `--budgets`, `--codec`, `--scorer` and `--scope`.
        policies: default policies.
        budgets: default budgets.
    """
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--policies",
        type=parse_names,
        default=policies,
        metavar="NAMES",
        help=f"policies separated by commas; 'default' is the servers' (default: {','.join(policies)})",
    )
    group.add_argument(
        "--budgets",
        type=parse_budgets,
        default=budgets,
        metavar="NUMBERS",
        help="budgets of each policy, separated by commas. A policy skips the budgets that it cannot keep, and runs "
        f"at its own if none is left (default: {','.join(f'{one:g}' for one in budgets)})",
    )
    for name, what in (("codec", "codec that encodes the tiers"), ("scorer", "scorer that ranks the tokens")):
        group.add_argument(f"--{name}", metavar="NAME", help=f"{what} (default: the servers')")
    group.add_argument(
        "--scope", metavar="NAME", help="'layer': each layer has its own tiers; 'model': all layers share them"
    )


def kv_choices(arguments: argparse.Namespace) -> "list[KvChoice]":
    """Return the choices of the flags of `add_kv_flags`: one for each policy at each budget that it can keep.

    Raises:
        InvalidArgumentError: a policy is unknown.
    """
    from spectrumkv.client.request import KvChoice
    from spectrumkv.common.kv.policies import policies

    choices = []
    for name in arguments.policies:
        policy = policies.get(PrefillConfig.policy if name == DEFAULT else name)
        fixed = policy.min_budget == policy.max_budget
        fitting = [one for one in arguments.budgets if policy.min_budget <= one <= policy.max_budget]
        for budget in fitting if fitting and not fixed else [None]:
            choices.append(
                KvChoice(
                    budget=budget,
                    policy=policy.name,
                    scorer=arguments.scorer,
                    codec=arguments.codec,
                    scope=arguments.scope,
                )
            )
    return choices


def add_geometry_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that give the shape of a synthetic KV cache; the default is that of the embedded model."""
    group = parser.add_argument_group("the cache's shape (default: the embedded model's)")
    add_number_flags(
        group,
        ("tokens", 2048, "tokens of the prompt"),
        ("layers", 30, "layers"),
        ("kv-heads", 3, "KV heads of a layer"),
        ("head-dim", 64, "elements of a key in a head"),
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype that the model computes in (default: %(default)s)",
    )


def geometry_from(arguments: argparse.Namespace) -> "KvGeometry":
    """Return the geometry of the flags of `add_geometry_flags`, which leaves out `--tokens`.

    Raises:
        InvalidArgumentError: a number is not allowed.
    """
    import torch

    from spectrumkv.common.kv.geometry import KvGeometry

    dtype: torch.dtype = getattr(torch, arguments.dtype)
    return KvGeometry(arguments.layers, arguments.kv_heads, arguments.head_dim, dtype)


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names in a text such as "a,b,c".

    Raises:
        argparse.ArgumentTypeError: a name is empty.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: names separated by commas")
    return names


def parse_budgets(text: str) -> tuple[float, ...]:
    """Return the budgets in a text such as "0.5,0.4".

    Raises:
        argparse.ArgumentTypeError: a budget is not a number above 0 and up to 1.
    """
    try:
        budgets = tuple(float(part) for part in text.split(","))
    except ValueError:
        budgets = (0.0,)
    if not all(0 < budget <= 1 for budget in budgets):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: numbers above 0 and up to 1, separated by commas")
    return budgets
