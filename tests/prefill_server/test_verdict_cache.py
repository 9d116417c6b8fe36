"""A verdict in the cache: it comes back where it holds, and what is damaged is none."""

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spectrumkv.common.model.cache import write_entry
from spectrumkv.prefill_server.tuning.probe.verdict_cache import VerdictKey, keep_verdict, read_verdict
from spectrumkv.prefill_server.verdict import ProbeVerdict
from tests.prefill_server.test_verdict import KEY, SPEC, VERDICT, verdict_of


def test_a_kept_verdict_comes_back_as_cached(cache: Path) -> None:
    assert read_verdict(KEY) is None
    keep_verdict(KEY, VERDICT)
    assert read_verdict(KEY) == replace(VERDICT, source="cache")
    newer = verdict_of(0, 3)
    keep_verdict(KEY, newer)
    assert read_verdict(KEY) == replace(newer, source="cache")
    assert list((cache / "probes").iterdir()) == [KEY.path()]


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, codecs=(("absmax2", 1), ("spectral", 1))),
        replace(KEY, codecs=(("absmax", 1), ("spectral", 2))),
        replace(KEY, basis="4" * 64),
        replace(KEY, probe_version=2),
        replace(KEY, model=replace(SPEC, weights_digest="f" * 64)),
        replace(KEY, model=replace(SPEC, dtype="bfloat16")),
        replace(KEY, model=replace(SPEC, tokenizer_digest="f" * 64)),
    ],
)
def test_a_verdict_holds_for_what_was_probed_only(cache: Path, other: VerdictKey) -> None:
    keep_verdict(KEY, VERDICT)
    assert read_verdict(other) is None
    keep_verdict(other, verdict_of(0, 3))
    assert read_verdict(KEY) == replace(VERDICT, source="cache")


def _kept(verdict: ProbeVerdict) -> dict[str, Any]:
    keep_verdict(KEY, verdict)
    kept: dict[str, Any] = json.loads(KEY.path().read_text().partition("\n")[2])
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
        # Another number, as plausible as the first.
        text.replace("5", "6", 1).encode(),
        json.dumps(whole).encode(),
    )
    contradictory = (
        whole | {"int4_allowed": "perhaps"},
        whole | {"unknown": 1},
        whole | {"trials": []},
        whole | {"settings": whole["settings"][:-2]},
        whole | {"safe_budget": 0.1},
        whole | {"source": "flag"},
    )
    writers = [
        *(partial(KEY.path().write_bytes, content) for content in damaged),
        *(partial(write_entry, KEY.path(), "a verdict", json.dumps(content)) for content in contradictory),
    ]
    for write in writers:
        write()
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
