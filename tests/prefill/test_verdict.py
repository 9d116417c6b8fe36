import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.prefill_server.verdict import ProbeTrial, ProbeVerdict
from spectrumkv.prefill_server.verdict_cache import VerdictKey, keep_verdict, read_verdict

SPEC = ModelSpec(
    architecture="llama",
    weights_digest="0" * 64,
    layers=2,
    kv_heads=2,
    head_dim=64,
    dtype="float32",
    rope_digest="1" * 64,
    tokenizer_digest="2" * 64,
    vocab_size=100,
    context_length=128,
)
KEY = VerdictKey(SPEC, "absmax", codec_version=1, probe_version=1)


def trials(found: int, exact: int) -> tuple[ProbeTrial, ...]:
    return tuple(ProbeTrial(1000 + i, i / 2, i < found, i < exact, f"answer {i}") for i in range(3))


VERDICT = ProbeVerdict.from_trials(trials(3, 2))


@pytest.mark.parametrize(
    ("found", "exact", "allowed"),
    [
        (0, 3, False), (1, 3, False), (2, 3, True), (3, 3, True),
        (0, 2, False), (1, 2, False), (2, 2, True), (3, 2, True),
        (0, 1, False), (1, 1, False), (2, 1, False), (3, 1, False),
        (0, 0, False), (3, 0, False),
    ],
)  # fmt: skip
def test_two_of_three_needles_allow_int4(found: int, exact: int, allowed: bool) -> None:
    verdict = ProbeVerdict.from_trials(trials(found, exact))
    assert verdict.int4_allowed is allowed
    assert verdict.source == "probe"
    assert f"{exact}" in verdict.reason
    assert ("--int4 on" in verdict.reason) is (exact < 2)
    assert ("can tell nothing" in verdict.reason) is (exact < 2)
    if exact >= 2:
        assert f"{found} of 3 needles" in verdict.reason


@pytest.mark.parametrize(("flag", "allowed"), [("on", True), ("off", False)])
def test_a_flag_is_a_verdict(flag: str, allowed: bool) -> None:
    verdict = ProbeVerdict.from_flag(flag)
    assert (verdict.int4_allowed, verdict.source, verdict.trials) == (allowed, "flag", ())
    assert f"--int4 {flag}" in verdict.reason


def test_verdicts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'guess'; valid: probe, cache, flag"):
        replace(VERDICT, source="guess")
    with pytest.raises(InvalidArgumentError, match="no reason"):
        replace(VERDICT, reason="")
    with pytest.raises(InvalidArgumentError, match="'flag' rests on 3 trials"):
        replace(VERDICT, source="flag")
    with pytest.raises(InvalidArgumentError, match="'probe' rests on 2 trials"):
        ProbeVerdict.from_trials(VERDICT.trials[:2])
    with pytest.raises(InvalidArgumentError, match=r"depth 1\.5"):
        replace(VERDICT.trials[0], depth=1.5)
    with pytest.raises(InvalidArgumentError, match="0 prompt tokens"):
        replace(VERDICT.trials[0], prompt_tokens=0)
    with pytest.raises(InvalidArgumentError, match="'auto'"):
        ProbeVerdict.from_flag("auto")


@pytest.mark.parametrize("verdict", [VERDICT, ProbeVerdict.from_trials(trials(0, 0)), ProbeVerdict.from_flag("on")])
def test_the_message_has_all_of_a_verdict(verdict: ProbeVerdict) -> None:
    assert ProbeVerdict.from_proto(verdict.to_proto()) == verdict


def test_a_kept_verdict_comes_back_as_cached(cache: Path) -> None:
    assert read_verdict(KEY) is None
    keep_verdict(KEY, VERDICT)
    assert read_verdict(KEY) == replace(VERDICT, source="cache")
    newer = ProbeVerdict.from_trials(trials(0, 3))
    keep_verdict(KEY, newer)
    assert read_verdict(KEY) == replace(newer, source="cache")
    assert list((cache / "probes").iterdir()) == [KEY.path()]


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, codec="absmax2"),
        replace(KEY, codec_version=2),
        replace(KEY, probe_version=2),
        replace(KEY, model=replace(SPEC, weights_digest="f" * 64)),
        replace(KEY, model=replace(SPEC, dtype="bfloat16")),
        replace(KEY, model=replace(SPEC, tokenizer_digest="f" * 64)),
    ],
)
def test_a_verdict_holds_for_what_was_probed_only(cache: Path, other: VerdictKey) -> None:
    keep_verdict(KEY, VERDICT)
    assert read_verdict(other) is None
    keep_verdict(other, ProbeVerdict.from_trials(trials(0, 3)))
    assert read_verdict(KEY) == replace(VERDICT, source="cache")


def _kept(verdict: ProbeVerdict) -> dict[str, object]:
    keep_verdict(KEY, verdict)
    kept: dict[str, object] = json.loads(KEY.path().read_text())
    return kept


def test_a_damaged_file_is_no_verdict(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = _kept(VERDICT)
    text = KEY.path().read_text()
    damaged = (
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        text[: len(text) // 2].encode(),
        json.dumps(whole | {"int4_allowed": "perhaps"}).encode(),
        json.dumps(whole | {"unknown": 1}).encode(),
        json.dumps(whole | {"trials": []}).encode(),
        json.dumps(whole | {"source": "flag"}).encode(),
    )
    for content in damaged:
        KEY.path().write_bytes(content)
        caplog.clear()
        assert read_verdict(KEY) is None
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert str(KEY.path()) in caplog.text
    keep_verdict(KEY, VERDICT)
    assert read_verdict(KEY) == replace(VERDICT, source="cache")


def test_a_cache_that_cannot_be_used_costs_a_warning(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    KEY.path().mkdir(parents=True)
    keep_verdict(KEY, VERDICT)
    assert "cannot keep" in caplog.text
    assert list((cache / "probes").iterdir()) == [KEY.path()]
    assert read_verdict(KEY) is None
    assert "cannot use" in caplog.text
    caplog.clear()
    KEY.path().rmdir()
    (cache / "probes").rmdir()
    (cache / "probes").write_text("a file where the directory should be")
    keep_verdict(KEY, VERDICT)
    assert "cannot keep" in caplog.text
