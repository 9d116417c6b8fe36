"""The flags of speed benches that say how the KV cache travels: several policies and budgets in one run."""

import argparse
from typing import TYPE_CHECKING

from spectrumkv.bench.flags.method_flags import parse_budgets, parse_names

if TYPE_CHECKING:
    from spectrumkv.client.request import KvChoice

DEFAULT = "default"


def add_kv_flags(parser: argparse.ArgumentParser, policies: tuple[str, ...], budgets: tuple[float, ...]) -> None:
    """Add `--policies`, `--budgets`, `--codec`, `--scorer` and `--scope`."""
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
        help="budgets of each policy, separated by commas; a policy skips those that it cannot keep to, and runs at "
        f"its own where that leaves none (default: {','.join(f'{one:g}' for one in budgets)})",
    )
    for name, what in (("codec", "how tiers are coded"), ("scorer", "how tokens are ranked")):
        group.add_argument(f"--{name}", metavar="NAME", help=f"{what} (default: the servers')")
    group.add_argument("--scope", metavar="NAME", help="tiers per 'layer' or one for the whole 'model'")


def kv_choices(arguments: argparse.Namespace) -> "list[KvChoice]":
    """Read the flags of `add_kv_flags`: one choice for each policy at each budget that it can keep to.

    Raises:
        InvalidArgumentError: a policy is unknown.
    """
    from spectrumkv.client.request import KvChoice
    from spectrumkv.common.kv.policies import policies
    from spectrumkv.common.service.config import PrefillConfig

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
