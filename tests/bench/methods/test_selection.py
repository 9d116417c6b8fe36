import argparse

import pytest
from prometheus_client import CollectorRegistry

from spectrumkv.bench.flags import DEFAULT_BUDGETS, add_method_flags
from spectrumkv.bench.methods.selection import Choice, MethodSelector, Selection
from spectrumkv.bench.methods.wire_method import WireMethod, is_fixed
from spectrumkv.bench.models.synthetic_prompt import synthetic_basis
from spectrumkv.bench.peers.baselines import Baseline, baselines
from spectrumkv.bench.peers.quanto import QUANTO
from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.budget import BudgetKind
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.common.service.config import PrefillConfig, build
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.prefill_server.transfer.plan import default_budget
from spectrumkv.prefill_server.verdict import ProbeVerdict

VERDICT = ProbeVerdict.from_flag("on", layers=3)


def select(tiny_llama: LoadedModel, *flags: str) -> Selection:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_method_flags(parser)
    choice = Choice.from_arguments(parser.parse_args(flags))
    metrics = Metrics(CollectorRegistry())
    basis = synthetic_basis(tiny_llama.geometry)
    return MethodSelector(choice, build(PrefillConfig, {}), VERDICT, tiny_llama.spec, metrics, basis).select()


def spelled(selection: Selection) -> list[tuple[str, float]]:
    return [(method.policy, method.budget) for method in selection.methods]


def test_all_is_every_policy_and_every_installed_baseline(tiny_llama: LoadedModel) -> None:
    selection = select(tiny_llama)
    installed = [name for name in baselines if baselines.get(name).installed]
    assert list(dict.fromkeys(name for name, _ in spelled(selection))) == [*policies, *installed]
    missing = [name for name in baselines if name not in installed]
    assert [note for note in selection.notes if "spectrumkv[peers]" in note] == [
        note for note in selection.notes if any(note.startswith(f"{name} ") for name in missing) and "peers" in note
    ]


@pytest.mark.parametrize("name", policies.names())
def test_fixed_policies_run_once_and_others_at_every_budget_in_their_range(
    tiny_llama: LoadedModel, name: str
) -> None:
    policy = policies.get(name)
    budgets = [method.budget for method in select(tiny_llama, "--policies", name).methods]
    if is_fixed(policy):
        assert budgets == [policy.min_budget]
    else:
        assert budgets == [one for one in DEFAULT_BUDGETS if policy.min_budget <= one <= policy.max_budget]


def test_the_help_says_of_which_policies_budgets_are_bytes() -> None:
    parser = argparse.ArgumentParser()
    add_method_flags(parser)
    said = " ".join(parser.format_help().split())
    counted = " or ".join(name for name in policies if policies.get(name).budget_kind is BudgetKind.BYTES)
    assert f"policy {counted} counts all bytes sent" in said
    assert "other policies count the mean cost per token, without scales and framing, as baselines do" in said


@pytest.mark.parametrize(
    ("names", "run"), [("quanto-4bit", True), ("all", True), ("fp16,quanto-2bit-kivi", True), ("fp16", False)]
)
def test_a_choice_knows_which_peers_it_runs_on(monkeypatch: pytest.MonkeyPatch, names: str, run: bool) -> None:
    pytest.importorskip(QUANTO)
    parser = argparse.ArgumentParser()
    add_method_flags(parser)
    choice = Choice.from_arguments(parser.parse_args(["--policies", names]))
    assert choice.runs_on(QUANTO) is run
    monkeypatch.setattr(Baseline, "installed", property(lambda baseline: baseline.requires != QUANTO))
    assert not choice.runs_on(QUANTO)


def test_default_is_what_the_servers_use(tiny_llama: LoadedModel) -> None:
    config = build(PrefillConfig, {})
    (method,) = select(tiny_llama, "--policies", "default").methods
    assert isinstance(method, WireMethod)
    assert method.policy == config.policy
    assert method.budget == default_budget(policies.get(config.policy), config, VERDICT)
    assert method.plan.scope == config.scope
    at_budgets = select(tiny_llama, "--policies", "default", "--budgets", "0.9,0.6").methods
    assert [one.budget for one in at_budgets] == [0.9, 0.6]


def test_codecs_scorers_and_scopes_multiply(tiny_llama: LoadedModel) -> None:
    selection = select(
        tiny_llama,
        "--policies",
        "greedy:absmax",
        "--budgets",
        "0.5",
        "--scorer",
        "random,position",
        "--scope",
        "layer,model",
    )
    assert [(one.codec, one.scorer, one.scope) for one in selection.methods] == [
        ("absmax", "random", "layer"), ("absmax", "random", "model"),
        ("absmax", "position", "layer"), ("absmax", "position", "model"),
    ]  # fmt: skip


def test_the_same_method_is_measured_once(tiny_llama: LoadedModel) -> None:
    selection = select(tiny_llama, "--policies", "greedy,greedy,all", "--budgets", "0.5,0.5")
    assert len(set(spelled(selection))) == len(selection.methods)


def test_what_is_left_out_is_said(tiny_llama: LoadedModel) -> None:
    selection = select(tiny_llama, "--policies", "greedy", "--budgets", "0.5,0.1")
    assert spelled(selection) == [("greedy", 0.5)]
    assert selection.notes == ["greedy at 0.1 is left out: its budgets go from 0.25 to 1"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policies", "best"], "unknown policy 'best'; allowed: all, default, spectral"),
        (["--policies", "greedy:zip"], "unknown codec 'zip'"),
        (["--policies", "uniform-int3:absmax"], "has its own codec"),
        (["--policies", "greedy", "--budgets", "0.1"], "nothing to measure: greedy at 0.1"),
        (["--policies", "greedy", "--codec", "native"], "codec 'native' cannot write policy 'greedy'"),
        (["--codec", "zip"], "unknown codec 'zip'"),
        (["--scorer", "luck"], "unknown scorer 'luck'"),
        (["--scope", "token"], "unknown scope 'token'"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_wrong_choices_are_refused(tiny_llama: LoadedModel, flags: list[str], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        select(tiny_llama, *flags)


@pytest.mark.parametrize(
    "flags", [["--budgets", "0"], ["--budgets", "0.5,x"], ["--budgets", "1.5"], ["--policies", "a,,b"]]
)
def test_unreadable_flags_are_wrong_usage(tiny_llama: LoadedModel, flags: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        select(tiny_llama, *flags)
