"""Select the methods that a bench runs, from the names, budgets, codecs and scorers of its flags."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from spectrumkv.bench.flags import DEFAULT, DEFAULT_BUDGETS
from spectrumkv.bench.methods.method import Method
from spectrumkv.bench.methods.wire_method import WireMethod, is_fixed
from spectrumkv.bench.peers import pdtrim, quanto  # noqa: F401  # they register their baselines
from spectrumkv.bench.peers.baselines import BaselineMethod, baselines
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.base import codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.plan import SCOPES
from spectrumkv.common.kv.policies import Policy, policies
from spectrumkv.common.kv.scoring import scorers
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2

ALL = "all"


@dataclass(frozen=True)
class Entry:
    """Hold one name of `--policies`.

    Attributes:
        name: the name of a policy or baseline, or "default".
        codec: the codec after the colon; empty without one.
        asked_for: whether the flag has the name itself, and not only "all".
    """

    name: str
    codec: str
    asked_for: bool


@dataclass(frozen=True)
class Choice:
    """Hold the values of the flags of `add_method_flags`.

    Attributes:
        entries: policies and baselines.
        budgets: None if the flag was not given.
        codecs: the codecs of entries without a codec; an empty name is the servers' default.
        scorers: an empty name is the servers' default.
        scopes: an empty name is the servers' default.
        seed: seed of random draws.
    """

    entries: tuple[Entry, ...]
    budgets: tuple[float, ...] | None
    codecs: tuple[str, ...]
    scorers: tuple[str, ...]
    scopes: tuple[str, ...]
    seed: int

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Choice":
        """Return the choice that the flags of `add_method_flags` describe.

        Raises:
            InvalidArgumentError: a name is unknown, or needs an extra that is not installed.
        """
        for codec in filter(None, arguments.codec):
            codecs.get(codec)
        for scorer in filter(None, arguments.scorer):
            scorers.get(scorer)
        if unknown := [scope for scope in arguments.scope if scope and scope not in SCOPES]:
            raise InvalidArgumentError(f"unknown scope {unknown[0]!r}; allowed: {', '.join(SCOPES)}")
        if arguments.seed < 0:
            raise InvalidArgumentError(f"--seed is {arguments.seed}; allowed: 0 or more")
        return cls(
            entries=tuple(_entries(arguments.policies)),
            budgets=arguments.budgets,
            codecs=arguments.codec,
            scorers=arguments.scorer,
            scopes=arguments.scope,
            seed=arguments.seed,
        )

    def runs_on(self, module: str) -> bool:
        """Return whether an entry is a baseline that needs this module of an optional extra, which is installed."""
        chosen = [baselines.get(entry.name) for entry in self.entries if entry.name in baselines]
        return any(one.requires == module and one.installed for one in chosen)


@dataclass
class Selection:
    """Hold the selected methods, in order and without duplicates, and what was left out.

    Attributes:
        methods: the methods to run.
        notes: sentences that say what is left out, and why.
    """

    methods: list[Method] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, method: Method) -> None:
        """Append a method unless it is already selected."""
        if all(_identity(method) != _identity(one) for one in self.methods):
            self.methods.append(method)

    def note(self, sentence: str) -> None:
        """Note what is left out, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


@dataclass(frozen=True)
class MethodSelector:
    """Turn a choice into methods.

    Attributes:
        choice: the values of the flags.
        config: the servers' defaults.
        verdict: the probe's verdict on the model.
        spec: the model's spec.
        metrics: counts every byte.
        basis: the model's basis, for codecs that need one.
    """

    choice: Choice
    config: PrefillConfig
    verdict: ProbeVerdict
    spec: ModelSpec
    metrics: Metrics
    basis: Basis | None

    def select(self) -> Selection:
        """Return the methods.

        Raises:
            InvalidArgumentError: a policy that is asked for by name cannot keep any of the budgets, or its codec
                cannot encode its tiers.
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
                selection.note(f"{name} at {budget:g} is left out: its budgets go from {least:g} to {most:g}")

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
            raise InvalidArgumentError(f"baseline {name!r} has its own codec; leave out :{codec}")
        if not baselines.get(name).installed:
            raise InvalidArgumentError(f"baseline {name!r} cannot run: {_missing(name)}")
        return
    if name != DEFAULT and name not in policies:
        valid = ", ".join((ALL, DEFAULT, *policies, *baselines))
        raise InvalidArgumentError(f"unknown policy {name!r}; allowed: {valid}")
    if codec:
        codecs.get(codec)


def _missing(name: str) -> str:
    return f"{baselines.get(name).requires} is not installed (pip install 'spectrumkv[peers]')"


def _identity(method: Method) -> tuple[str, str, str, str, float]:
    return method.policy, method.codec, method.scorer, method.scope, method.budget
