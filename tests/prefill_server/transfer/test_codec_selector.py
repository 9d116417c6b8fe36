"""The spectral codec is used where it costs no time, and its fallback where it would hold a request up."""

from dataclasses import replace

import pytest
import torch

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs import codecs
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.service.config import PrefillConfig
from spectrumkv.prefill_server.transfer.codec_selector import ENOUGH, CodecSelector
from spectrumkv.prefill_server.transfer.plan import KvPlan
from spectrumkv.prefill_server.transfer.sent_kv import SentKv
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2
from tests.common.kv.codecs.spectral_prompts import basis_of

SHAPE = KvGeometry(3, 2, 64, torch.float16)
WORKER = "127.0.0.1:50052"
TOKENS = 4096


def plan(**options: str | float) -> KvPlan:
    asked = prefill_pb2.KvOptions(policy="spectral", **options)  # type: ignore[arg-type]
    return KvPlan.resolve(asked, PrefillConfig(), ProbeVerdict.from_flag("on", SHAPE.layers), 0, basis_of(SHAPE))


def sent(coding: float, link: float = 0.0, waiting: float = 0.0) -> SentKv:
    """A request at 0.3 that took the coder some seconds, besides those in which it waited for a core."""
    return SentKv(
        message_bytes=int(0.3 * SHAPE.fp16_bytes(TOKENS)),
        encode_seconds=coding + waiting,
        coder_seconds=coding,
        link_seconds=link,
    )


def seen(prefill: float, coding: float, link: float, worker: str = WORKER) -> CodecSelector:
    """A choice that has seen coded requests at 0.3: seconds of prefill, coding, and waiting for the link."""
    choice = CodecSelector(SHAPE)
    for _ in range(ENOUGH):
        choice.observe(plan(budget=0.3), TOKENS, worker, prefill, sent(coding, link))
    return choice


@pytest.mark.parametrize(
    ("prefill", "coding", "link", "codec"),
    [
        pytest.param(4.0, 0.3, 0.0, "spectral", id="the model takes longer: a CPU"),
        pytest.param(0.3, 7.0, 0.0, "fixed_rate", id="the coder takes longest: a GPU and a fast network"),
        pytest.param(0.3, 7.0, 5.0, "spectral", id="the link takes longest"),
        pytest.param(0.001, 0.04, 0.0, "spectral", id="nobody would notice"),
    ],
)
def test_the_slowest_stage_decides(prefill: float, coding: float, link: float, codec: str) -> None:
    settled = seen(prefill, coding, link).select(plan(budget=0.3), TOKENS, WORKER)
    assert settled.codec.name == codec
    assert bool(settled.codec_reason) == (codec == "fixed_rate")


def test_the_reason_names_what_was_compared() -> None:
    settled = seen(0.3, 7.0, 0.0).select(plan(budget=0.3), TOKENS, WORKER)
    assert settled.codec_reason == (
        "coding would take 7.00 s, longer than computing the prompt (0.30 s) "
        "and sending it to 127.0.0.1:50052 (0.00 s)"
    )


def test_nothing_is_chosen_that_was_named_or_is_not_known() -> None:
    choice = seen(0.3, 7.0, 0.0)
    assert choice.select(plan(budget=0.3, codec="spectral"), TOKENS, WORKER).codec.name == "spectral"
    assert choice.select(plan(budget=0.05), TOKENS, WORKER).codec.name == "fixed_rate"
    assert choice.select(plan(budget=0.3), TOKENS, "127.0.0.1:50099").codec.name == "spectral"
    assert CodecSelector(SHAPE).select(plan(budget=0.3), TOKENS, WORKER).codec.name == "spectral"


def test_one_stall_decides_nothing_and_short_prompts_teach_nothing() -> None:
    choice = seen(4.0, 0.3, 0.0)
    choice.observe(plan(budget=0.3), TOKENS, WORKER, 4.0, sent(30.0))
    assert choice.select(plan(budget=0.3), TOKENS, WORKER).codec.name == "spectral"
    brief = CodecSelector(SHAPE)
    for _ in range(ENOUGH):
        brief.observe(plan(budget=0.3), 10, WORKER, 0.003, sent(0.01))
    assert brief.select(plan(budget=0.3), TOKENS, WORKER).codec.name == "spectral"


def test_a_coder_that_waits_for_a_core_is_no_slow_coder() -> None:
    choice = CodecSelector(SHAPE)
    for _ in range(ENOUGH):
        choice.observe(plan(budget=0.3), TOKENS, WORKER, 0.3, sent(0.3, waiting=7.0))
    assert choice.select(plan(budget=0.3), TOKENS, WORKER).codec.name == "spectral"


def test_a_link_that_becomes_slow_brings_the_coder_back() -> None:
    choice = seen(0.3, 7.0, 0.0)
    fixed = choice.select(plan(budget=0.3), TOKENS, WORKER)
    for _ in range(20):
        choice.observe(fixed, TOKENS, WORKER, 0.3, sent(0.1, link=12.0))
    assert choice.select(plan(budget=0.3), TOKENS, WORKER).codec.name == "spectral"


def test_what_the_fallback_wrote_teaches_however_short_and_what_was_asked_for_by_name_teaches_nothing() -> None:
    choice = seen(0.3, 7.0, 0.0)
    fixed = choice.select(plan(budget=0.3), TOKENS, WORKER)
    assert fixed.uses_fallback
    for _ in range(20):
        choice.observe(plan(budget=0.3, codec="absmax"), TOKENS, WORKER, 60.0, sent(0.1, link=12.0))
    assert choice.select(plan(budget=0.3), TOKENS, WORKER).uses_fallback
    for _ in range(20):
        choice.observe(fixed, TOKENS, WORKER, 0.3, sent(0.01, link=12.0))
    assert not choice.select(plan(budget=0.3), TOKENS, WORKER).uses_fallback


def test_a_fallback_that_turns_out_no_faster_is_not_taken_again() -> None:
    choice = seen(0.3, 7.0, 0.0)
    tried = choice.select(plan(budget=0.3), TOKENS, WORKER)
    for _ in range(ENOUGH):
        choice.observe(tried, TOKENS, WORKER, 0.3, sent(7.0))
    assert not choice.select(plan(budget=0.3), TOKENS, WORKER).uses_fallback
    faster = seen(0.3, 7.0, 0.0)
    for _ in range(ENOUGH):
        faster.observe(tried, TOKENS, WORKER, 0.3, sent(2.0))
    assert faster.select(plan(budget=0.3), TOKENS, WORKER).uses_fallback


def test_on_a_gpu_the_codec_with_kernels_writes_from_the_first_request_on() -> None:
    choice = CodecSelector(SHAPE, on_gpu=True, kernels_code=True)
    for budget in (0.05, 0.3):
        settled = choice.select(plan(budget=budget), TOKENS, WORKER)
        assert settled.codec.name == "fixed_rate"
        assert settled.codec_reason == "the model runs on a GPU, and codec spectral does not"
    assert choice.select(plan(budget=0.3, codec="spectral"), TOKENS, WORKER).codec.name == "spectral"
    assert choice.select(plan(budget=0.3), TOKENS, WORKER, lacks_basis=True).codec.name == "absmax"


def test_on_a_gpu_whose_kernels_fail_whole_tiers_stand_in_where_a_coder_holds_requests_up() -> None:
    choice = replace(seen(0.3, 7.0, 0.0), on_gpu=True)
    assert choice.select(plan(budget=0.3), TOKENS, WORKER).codec.name == "absmax"
    # Whole tiers take more than this at the least.
    assert choice.select(plan(budget=0.1), TOKENS, WORKER).codec.name == "spectral"
    assert choice.select(plan(budget=0.3, codec="spectral"), TOKENS, WORKER).codec.name == "spectral"
    assert CodecSelector(SHAPE, on_gpu=True).select(plan(budget=0.3), TOKENS, WORKER).codec.name == "spectral"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_worker_without_the_basis_gets_what_needs_none(on_gpu: bool) -> None:
    choice = CodecSelector(SHAPE, on_gpu)
    chosen = choice.select(plan(budget=0.3), TOKENS, WORKER, lacks_basis=True)
    assert chosen.codec.name == "absmax"
    assert chosen.codec_reason == f"{WORKER} has not received the codec's basis yet"
    # Whole tiers take more than this at the least.
    assert choice.select(plan(budget=0.2), TOKENS, WORKER, lacks_basis=True).codec.needs_basis
    assert choice.basis_free(plan(budget=0.3, codec="fixed_rate")) is None


def test_the_basis_free_codec_can_be_asked_for_by_name_from_int4_everywhere_up() -> None:
    assert plan(budget=0.4, codec="absmax").codec.name == "absmax"
    with pytest.raises(InvalidArgumentError, match=r"takes 0\.\d+ of FP16 with every token at INT4"):
        plan(budget=0.2, codec="absmax").encoder(SHAPE, 100, 0)
    with pytest.raises(InvalidArgumentError, match="written by codec 'spectral', not by 'native'"):
        plan(budget=0.4, codec="native")


def test_a_codec_without_a_fallback_is_never_replaced() -> None:
    tiered = KvPlan.resolve(
        prefill_pb2.KvOptions(policy="adaptive", budget=0.3),
        PrefillConfig(),
        ProbeVerdict.from_flag("on", SHAPE.layers),
        seed=0,
    )
    assert tiered.codec_is_open
    assert tiered.fallback is None
    assert seen(0.3, 7.0, 0.0).select(tiered, TOKENS, WORKER) is tiered


def test_every_fallback_is_a_codec_that_writes_the_same_policies() -> None:
    for name in codecs:
        codec = codecs.get(name)
        for other in (codec.fallback, codec.basis_free):
            written = [one for one in policies if codec.writes(policies.get(one))]
            assert other is None or all(codecs.get(other).writes(policies.get(one)) for one in written)
        assert codec.basis_free is None or not codecs.get(codec.basis_free).needs_basis
