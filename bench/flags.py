"""The flags that say which methods are measured, shared by the benches that compare methods."""

import argparse

from spectrumkv.common.service.config import PrefillConfig

DEFAULT_BUDGETS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--policies`, `--budgets` and what goes with them."""
    group = parser.add_argument_group("methods")
    group.add_argument(
        "--policies",
        type=parse_names,
        default=("all",),
        metavar="NAMES",
        help="policies and baselines, separated by commas, a codec after a colon where it matters (greedy:absmax); "
        "'all' is every one, 'default' what the servers use (default: all)",
    )
    group.add_argument(
        "--budgets",
        type=parse_budgets,
        metavar="NUMBERS",
        help="budgets relative to FP16, separated by commas: for policy spectral all bytes that are sent, framing "
        "too; for policies of tiers and baselines the mean cost per token, scales and framing on top; methods skip "
        "those that they cannot keep to "
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
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: %(default)s)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--device` and `--dtype`."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="local directory or hub name (default: the embedded model)")
    for name, choices in (("device", "auto, cpu, cuda"), ("dtype", "auto, float32, float16, bfloat16")):
        default = getattr(PrefillConfig, name)
        group.add_argument(
            f"--{name}", default=default, metavar="NAME", help=f"one of {choices} (default: {default})"
        )


def add_output_flags(parser: argparse.ArgumentParser, plot: str) -> None:
    """Add `--json` and `--plot`."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write the rows as JSON ('-': stdout, instead of the table)")
    group.add_argument("--plot", metavar="FILE", help=f"{plot} (.png, .svg or .pdf)")


def parse_names(text: str) -> tuple[str, ...]:
    """Read "a,b,c".

    Raises:
        argparse.ArgumentTypeError: a name is empty.
    """
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: names separated by commas")
    return names


def parse_budgets(text: str) -> tuple[float, ...]:
    """Read "0.5,0.4".

    Raises:
        argparse.ArgumentTypeError: something in it is no number above 0 and up to 1.
    """
    try:
        budgets = tuple(float(part) for part in text.split(","))
    except ValueError:
        budgets = (0.0,)
    if not all(0 < budget <= 1 for budget in budgets):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: numbers above 0 and up to 1, separated by commas")
    return budgets
