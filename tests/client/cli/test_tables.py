from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from spectrumkv.client.cli.tables import usage_table
from spectrumkv.client.completion import Completion, Finished, TokenEvent
from tests.client.fake_servers import finished


def completion(tokens=3, **usage):
    """A completion of policy greedy that cost 0.5625 where usage does not say otherwise."""
    end = Finished.from_proto(finished(tokens).finished, 1.0)
    events = tuple(TokenEvent(index, 100 + index, "x", None, (), 0.1 * (index + 1)) for index in range(tokens))
    return Completion(events, replace(end, usage=replace(end.usage, **usage)))


def shown(completion, budget_asked=None):
    console = Console(file=StringIO(), width=200)
    console.print(usage_table(completion, budget_asked))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_nominal_cost_is_left_out_where_the_budget_is_counted():
    assert "budget counted 0.562" in shown(completion(policy="spectral"))
    assert "budget counted (nominal) 0.562 (0.550)" in shown(completion(policy="greedy"))


def test_one_token_has_no_hand_off_on_either_side():
    assert "hand-off – here, – at the server" in shown(completion(1, handoff_seconds=0.0))
    assert "hand-off 100.0 ms here, 250.0 ms at the server" in shown(completion(3))


@pytest.mark.parametrize(
    ("policy", "note"),
    [
        ("spectral", "above the 0.5 asked for: framing counts too, and short prompts cannot be sent in less"),
        ("greedy", "above the 0.5 asked for, which leaves out scales and framing"),
    ],
)
def test_more_than_was_asked_for_is_explained(policy, note):
    assert note in shown(completion(policy=policy), 0.5)


@pytest.mark.parametrize("asked", [None, 0.56, 0.5625, 0.6])
def test_what_is_not_known_to_be_more_by_one_per_cent_needs_no_note(asked):
    assert not any("asked for" in line for line in shown(completion(), asked))
