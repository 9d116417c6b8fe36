"""From names, budgets, codecs and scorers to the list of methods that a bench runs."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from spectrumkv.bench.flags.method_flags import DEFAULT_BUDGETS
from spectrumkv.bench.methods.served_model import Method
from spectrumkv.bench.methods.wire_method import WireMethod, is_fixed
from spectrumkv.bench.peers import pdtrim, quantized_cache  # noqa: F401  # they register their baselines
from spectrumkv.bench.peers.baselines import BaselineMethod, baselines
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.policies import Policy, policies
from spectrumkv.common.kv.scoring import scorers
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.plan import SCOPES, KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2

ALL, DEFAULT = "all", "default"


@dataclass(frozen=True)
class Entry:
    """One name of `--policies`.

    Attributes:
        name: of a policy or baseline, or "default".
        codec: named with it; empty where not.
        asked_for: by its own name and not through "all".
    """

    name: str
    codec: str
    asked_for: bool


@dataclass(frozen=True)
class Choice:
    """What the flags ask for; see `add_method_flags`.

    Attributes:
        entries: policies and baselines.
        budgets: None where the flag was not given.
        codecs: for entries that name none; an empty name is the servers' default.
        scorers: an empty name is the servers' default.
        scopes: an empty name is the servers' default.
        seed: of what is drawn.
    """

    entries: tuple[Entry, ...]
    budgets: tuple[float, ...] | None
    codecs: tuple[str, ...]
    scorers: tuple[str, ...]
    scopes: tuple[str, ...]
    seed: int

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Choice":
        """Read the flags.

        Raises:
            InvalidArgumentError: a name is unknown, or needs an extra that is not installed.
        """
        for codec in filter(None, arguments.codec):
            codecs.get(codec)
        for scorer in filter(None, arguments.scorer):
            scorers.get(scorer)
        if unknown := [scope for scope in arguments.scope if scope and scope not in SCOPES]:
            raise InvalidArgumentError(f"unknown scope {unknown[0]!r}; valid: {', '.join(SCOPES)}")
        if arguments.seed < 0:
            raise InvalidArgumentError(f"--seed is {arguments.seed}; it must not be negative")
        return cls(
            entries=tuple(_entries(arguments.policies)),
            budgets=arguments.budgets,
            codecs=arguments.codec,
            scorers=arguments.scorer,
            scopes=arguments.scope,
            seed=arguments.seed,
        )

    def runs_on(self, module: str) -> bool:
        """Whether a baseline among the entries runs on a module that an optional extra brings, and that is there."""
        chosen = [baselines.get(entry.name) for entry in self.entries if entry.name in baselines]
        return any(one.requires == module and one.installed for one in chosen)


@dataclass
class Selection:
    """The methods, in order and without doubles, and what was left out.

    Attributes:
        methods: to run.
        notes: sentences about what is left out and why.
    """

    methods: list[Method] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, method: Method) -> None:
        """Append a method unless it is there."""
        if all(_identity(method) != _identity(one) for one in self.methods):
            self.methods.append(method)

    def note(self, sentence: str) -> None:
        """Say what is left out, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


@dataclass(frozen=True)
class MethodSelector:
    """Turns a choice into methods.

    Attributes:
        choice: what the flags ask for.
        config: the servers' defaults.
        verdict: what the probe found.
        spec: the model's.
        metrics: told of every byte.
        basis: the model's, for codecs that need one.
    """

    choice: Choice
    config: PrefillConfig
    verdict: ProbeVerdict
    spec: ModelSpec
    metrics: Metrics
    basis: SpectralBasis | None

    def select(self) -> Selection:
        """Return the methods.

        Raises:
            InvalidArgumentError: a policy asked for by name cannot keep to any of the budgets, or its codec cannot
                write it.
        """
        selection = Selection()
        for entry in self.choice.entries:
            before = len(selection.methods)
            if entry.name in baselines:
                self._add_baseline(entry, selection)
            else:
                self._add_policy(entry, selection)
            if entry.asked_for and len(selection.methods) == before and len(self.choice.entries) == 1:
                raise InvalidArgumentError(f"there is nothing to measure: {'; '.join(selection.notes)}")
        return selection

    def _add_baseline(self, entry: Entry, selection: Selection) -> None:
        baseline = baselines.get(entry.name)
        if not baseline.installed:
            selection.note(f"{baseline.name} is left out: {_missing(baseline.name)}")
            return
        wanted = (baseline.min_budget,) if baseline.fixed else self.choice.budgets or DEFAULT_BUDGETS
        for budget in self._within(entry.name, wanted, baseline.min_budget, baseline.max_budget, selection):
            selection.add(BaselineMethod(baseline, budget))

    def _add_policy(self, entry: Entry, selection: Selection) -> None:
        policy = policies.get(self.config.policy if entry.name == DEFAULT else entry.name)
        named_codecs = (entry.codec,) if entry.codec else self.choice.codecs
        for codec, scorer, scope in product(named_codecs, self.choice.scorers, self.choice.scopes):
            options = prefill_pb2.KvOptions(
                policy="" if entry.name == DEFAULT else policy.name, codec=codec, scorer=scorer, scope=scope
            )
            try:
                for budget in self._budgets_of(entry, policy, selection):
                    selection.add(self._wire_method(options, budget))
            except InvalidArgumentError as error:
                if entry.asked_for:
                    raise
                selection.note(error.message)

    def _budgets_of(self, entry: Entry, policy: Policy, selection: Selection) -> Iterable[float | None]:
        if is_fixed(policy):
            return (policy.min_budget,)
        if entry.name == DEFAULT and self.choice.budgets is None:
            return (None,)
        wanted = self.choice.budgets or DEFAULT_BUDGETS
        return self._within(policy.name, wanted, policy.min_budget, policy.max_budget, selection)

    def _within(
        self, name: str, budgets: Sequence[float], least: float, most: float, selection: Selection
    ) -> Iterator[float]:
        for budget in budgets:
            if least <= budget <= most:
                yield budget
            else:
                selection.note(f"{name} at {budget:g} is left out: it keeps to budgets from {least:g} to {most:g}")

    def _wire_method(self, options: prefill_pb2.KvOptions, budget: float | None) -> WireMethod:
        asked = prefill_pb2.KvOptions()
        asked.CopyFrom(options)
        if budget is not None:
            asked.budget = budget
        plan = KvPlan.resolve(asked, self.config, self.verdict, self.choice.seed, self.basis)
        return WireMethod(plan, self.spec, self.config.chunk_bytes, self.metrics)


def _entries(names: Sequence[str]) -> Iterator[Entry]:
    for name in names:
        if name == ALL:
            yield from (Entry(one, "", asked_for=False) for one in (*policies, *baselines))
            continue
        policy, _, codec = name.partition(":")
        _check_name(policy, codec)
        yield Entry(policy, codec, asked_for=True)


def _check_name(name: str, codec: str) -> None:
    if name in baselines:
        if codec:
            raise InvalidArgumentError(f"baseline {name!r} has a codec of its own; leave :{codec} away")
        if not baselines.get(name).installed:
            raise InvalidArgumentError(f"baseline {name!r} cannot run: {_missing(name)}")
        return
    if name != DEFAULT and name not in policies:
        valid = ", ".join((ALL, DEFAULT, *policies, *baselines))
        raise InvalidArgumentError(f"unknown policy {name!r}; valid: {valid}")
    if codec:
        codecs.get(codec)


def _missing(name: str) -> str:
    return f"{baselines.get(name).requires} is not installed (pip install 'spectrumkv[peers]')"


def _identity(method: Method) -> tuple[str, str, str, str, float]:
    return method.policy, method.codec, method.scorer, method.scope, method.budget
