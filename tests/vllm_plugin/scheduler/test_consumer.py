"""The consumer's state machine: loads, rejections, aborts, preemption, each told once."""

from typing import Any

import pytest

from spectrumkv.vllm_plugin.scheduler.consumer import ConsumerSchedule
from spectrumkv.vllm_plugin.scheduler.params import PrefillElsewhere, prompt_digest
from tests.vllm_plugin.scheduler.fakes import Request

PROMPT = 100


def params(**others: Any) -> dict[str, Any]:
    found = PrefillElsewhere("t", "p.example", 14600, 2, PROMPT, "spectral", 0.3, prompt_digest(range(PROMPT)))
    return found.to_params() | others


def request(tokens: int = PROMPT + 1, request_id: str = "r", **others: Any) -> Request:
    return Request(request_id, tokens, params(**others))


def arrived(asked: Request) -> ConsumerSchedule:
    machine = ConsumerSchedule()
    machine.arrived(asked)
    return machine


def test_a_load_is_told_once_and_forgotten_once_it_ended() -> None:
    asked = request()
    machine = arrived(asked)
    assert [machine.matched_tokens(asked, 0) for _ in range(3)] == [PROMPT] * 3
    machine.allocated(asked, [4, 5], PROMPT)
    (load,) = machine.step().loads
    assert (load.request_id, load.transfer_id, load.tokens, load.skip, load.block_ids) == ("r", "t", 100, 0, (4, 5))
    assert load.addresses == ("p.example:14600", "p.example:14601")
    assert machine.step().loads == ()
    # vLLM calls again when it schedules the request after the load.
    machine.allocated(asked, [4, 5], 0)
    machine.reported(["r"])
    assert machine.matched_tokens(asked, 0) == 0
    machine.finished(asked)
    assert machine.idle


def test_what_is_in_the_prefix_cache_is_not_written() -> None:
    asked = request()
    machine = arrived(asked)
    assert machine.matched_tokens(asked, 64) == 36
    machine.allocated(asked, [4, 5], 36)
    (load,) = machine.step().loads
    assert (load.tokens, load.skip) == (PROMPT, 64)


def test_a_transfer_is_given_up_where_all_of_it_is_here() -> None:
    asked = request()
    machine = arrived(asked)
    assert machine.matched_tokens(asked, PROMPT) == 0
    machine.allocated(asked, [4, 5], 0)
    (given_up,) = machine.step().releases
    assert (given_up.request_id, given_up.transfer_id) == ("r", "t")
    assert machine.idle


def test_a_request_that_ends_while_it_waits_gives_its_transfer_up() -> None:
    asked = request()
    machine = arrived(asked)
    machine.finished(asked)
    machine.finished(asked)
    step = machine.step()
    assert ([one.transfer_id for one in step.releases], step.cancels) == (["t"], ())


def test_a_request_that_ends_while_it_loads_is_cancelled_and_reported_by_the_worker() -> None:
    asked = request()
    machine = arrived(asked)
    machine.allocated(asked, [4, 5], PROMPT)
    machine.step()
    machine.finished(asked)
    step = machine.step()
    assert (step.cancels, step.releases) == (("r",), ())
    assert not machine.idle
    machine.reported(["r"])
    assert machine.idle


def test_a_rejection_under_another_id_gives_the_transfer_up() -> None:
    rejected = Request("synthetic", 1, params(), [0])
    machine = arrived(rejected)
    machine.finished(rejected)
    (given_up,) = machine.step().releases
    assert (given_up.request_id, given_up.transfer_id) == ("synthetic", "t")
    assert machine.idle


def test_a_failed_or_preempted_request_computes_its_prompt_itself() -> None:
    asked = request()
    machine = arrived(asked)
    machine.allocated(asked, [4, 5], PROMPT)
    machine.step()
    machine.reported(["r"])
    assert machine.matched_tokens(asked, 0) == 0
    machine.allocated(asked, [8, 9], 0)
    assert machine.step().loads == ()


def test_kv_of_another_prompt_is_not_used() -> None:
    asked = Request("r", PROMPT, params(), [7] * PROMPT)
    machine = arrived(asked)
    assert machine.matched_tokens(asked, 0) == 0
    assert machine.rejects.take() == {"prompt": 1}
    assert len(machine.step().releases) == 1


def test_without_a_digest_all_of_the_prompt_is_expected() -> None:
    asked = request(PROMPT, prompt_digest=None, remote_num_tokens=None)
    assert arrived(asked).matched_tokens(asked, 0) == PROMPT


@pytest.mark.parametrize(
    ("given", "salt"),
    [({}, "spectrumkv spectral 0.3"), ({"policy": "native", "budget": 1.0}, ""), ({"do_remote_prefill": False}, "")],
)
def test_only_kv_that_is_not_exact_is_kept_apart_in_the_prefix_cache(given: dict[str, Any], salt: str) -> None:
    assert ConsumerSchedule().arrived(request(**given)) == salt


@pytest.mark.parametrize(
    "wrong",
    [{"transfer_id": ""}, {"remote_host": 3}, {"remote_port": 0}, {"remote_port": "1"}, {"remote_ranks": 0},
     {"remote_num_tokens": -1}, {"budget": "x"}, {"prompt_digest": 5}, {"prefetch": "end"}, {"prefetch": True}],
)  # fmt: skip
def test_bad_parameters_are_counted_and_the_request_runs_here(wrong: dict[str, Any]) -> None:
    asked = request(**wrong)
    machine = arrived(asked)
    assert machine.matched_tokens(asked, 0) == 0
    assert machine.rejects.take() == {"params": 1}
    assert machine.idle


def test_completions_of_one_request_fetch_the_same_transfer_each_for_itself() -> None:
    machine, both = ConsumerSchedule(), [request(request_id=f"{number}_r") for number in range(2)]
    for one in both:
        machine.arrived(one)
        machine.allocated(one, [1, 2], PROMPT)
    machine.finished(both[0])
    step = machine.step()
    assert [load.request_id for load in step.loads] == ["0_r", "1_r"]
    assert step.cancels == ("0_r",)


WHERE = {"do_remote_prefill": True, "transfer_id": "t", "remote_host": "p.example", "remote_port": 14600}


def test_an_announcement_is_told_to_the_workers_and_computed_as_any_request() -> None:
    asked = Request("a", 1, WHERE | {"prefetch": "begin"}, [1])
    machine = ConsumerSchedule()
    assert machine.arrived(asked) == ""
    assert machine.matched_tokens(asked, 0) == 0
    machine.allocated(asked, [7], 0)
    step = machine.step()
    (announced,) = step.prefetches
    assert (announced.request_id, announced.transfer_id, announced.addresses) == ("a", "t", ("p.example:14600",))
    assert (step.loads, step.releases, step.drops) == ((), (), ())
    machine.finished(asked)
    assert machine.idle


def test_an_announcement_is_taken_back() -> None:
    machine = arrived(Request("a", 1, WHERE | {"prefetch": "drop"}, [1]))
    assert not machine.idle
    step = machine.step()
    assert (step.drops, step.prefetches) == (("t",), ())
    assert machine.idle
