"""The producer's state machine: chunks, preemption, aborts."""

from typing import Any

import pytest

from spectrumkv.vllm_plugin.scheduler.params import prompt_digest
from spectrumkv.vllm_plugin.scheduler.producer import ProducerSchedule
from tests.vllm_plugin.scheduler.fakes import Output, Request, first_step, next_step

PROMPT = 100


def schedule() -> ProducerSchedule:
    return ProducerSchedule("p.example", 14600, 2, "spectral", 0.3)


def request(**params: Any) -> Request:
    return Request("r", PROMPT, {"do_remote_decode": True} | params)


def test_a_prompt_is_handed_out_in_the_step_that_completes_it() -> None:
    machine, asked = schedule(), request(transfer_id="t", budget=0.5, fetches=3)
    machine.arrived(asked)
    first = machine.step(first_step("r", [7], 64))
    second = machine.step(next_step("r", [9], 36, computed=64))
    steps = [*first.prefills, *second.prefills]
    assert [(one.first, one.count, one.is_last, one.block_ids) for one in steps] == [
        (0, 64, False, (7,)),
        (64, 36, True, (7, 9)),
    ]
    assert {(one.transfer_id, one.policy, one.budget, one.fetches) for one in steps} == {("t", "spectral", 0.5, 3)}
    # The token that it samples, and any after it, are no part of the prompt.
    assert machine.step(next_step("r", None, 1, computed=PROMPT)).prefills == ()
    params = machine.finished(asked, delivered=True)
    assert params == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": "t",
        "remote_host": "p.example",
        "remote_port": 14600,
        "remote_ranks": 2,
        "remote_num_tokens": PROMPT,
        "policy": "spectral",
        "budget": 0.5,
        "prompt_digest": prompt_digest(range(PROMPT)),
    }
    assert machine.step(Output()).discards == ()


def test_a_prefix_hit_begins_later_and_is_handed_out_whole() -> None:
    machine, asked = schedule(), request()
    machine.arrived(asked)
    (step,) = machine.step(first_step("r", [1, 2], 4, computed=96)).prefills
    assert (step.first, step.count, step.is_last, step.transfer_id) == (96, 4, True, "r")


def test_a_preempted_prompt_begins_again_with_new_pages() -> None:
    machine, asked = schedule(), request()
    machine.arrived(asked)
    machine.step(first_step("r", [1], 64))
    (again,) = machine.step(next_step("r", [5], 50, computed=0, resumed=True)).prefills
    (last,) = machine.step(next_step("r", [6], 50, computed=50)).prefills
    assert (again.first, again.block_ids, again.is_last) == (0, (5,), False)
    assert (last.first, last.block_ids, last.is_last) == (50, (5, 6), True)


def test_a_prompt_that_is_preempted_after_it_was_handed_out_is_not_handed_out_twice() -> None:
    machine, asked = schedule(), request()
    machine.arrived(asked)
    machine.step(first_step("r", [1], PROMPT))
    assert machine.step(next_step("r", [5], PROMPT, computed=0, resumed=True)).prefills == ()
    assert machine.finished(asked, delivered=True) is not None


@pytest.mark.parametrize("delivered", [True, False])
def test_an_aborted_prompt_is_discarded_once(delivered: bool) -> None:
    machine, asked = schedule(), request(transfer_id="t")
    machine.arrived(asked)
    machine.step(first_step("r", [1], 64))
    assert machine.finished(asked, delivered) is None
    assert machine.step(Output()).discards == ("t",)
    assert machine.step(Output()).discards == ()
    assert machine.finished(asked, delivered) is None


def test_a_finished_prompt_that_goes_nowhere_is_discarded() -> None:
    machine, asked = schedule(), request(transfer_id="t")
    machine.arrived(asked)
    machine.step(first_step("r", [1], PROMPT))
    # It ended with the token that ends a text: there is nothing left to decode.
    assert machine.finished(asked, delivered=False) is None
    assert machine.step(Output()).discards == ("t",)


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False}])
def test_other_requests_are_left_alone(params: dict[str, Any] | None) -> None:
    machine, other = schedule(), Request("r", PROMPT, params)
    machine.arrived(other)
    assert machine.step(first_step("r", [1], PROMPT)).prefills == ()
    assert machine.finished(other, delivered=True) is None
    assert machine.rejects.take() == {}


@pytest.mark.parametrize(
    "params", [{"budget": 2}, {"budget": "0.3"}, {"fetches": 0}, {"fetches": True}, {"policy": 3}, {"transfer_id": 1}]
)
def test_bad_parameters_are_counted_and_the_request_runs_here(params: dict[str, Any]) -> None:
    machine = schedule()
    machine.arrived(request(**params))
    assert machine.step(first_step("r", [1], PROMPT)).prefills == ()
    assert machine.rejects.take() == {"params": 1}


def test_bit_for_bit_has_one_price() -> None:
    machine = schedule()
    machine.arrived(request(policy="native", budget=0.3))
    (step,) = machine.step(first_step("r", [1], PROMPT)).prefills
    assert (step.policy, step.budget) == ("native", 1.0)
