"""The short form of the soak: some hundred requests, and every kind of harm to a worker once."""

import random
from pathlib import Path

import pytest

from tests.faults.report import tell
from tests.faults.soak.soak import HARMS, Plan, soak

REQUESTS, HARM_SECONDS = 300, 5.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_short_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(REQUESTS, len(HARMS), HARM_SECONDS, random.SystemRandom().randrange(1 << 32))
    findings = soak(plan, tmp_path)
    tell(capsys, findings.sentence(plan))
    assert findings.wrong == []
    assert {harm.what for harm in findings.harms} >= {what for _, what in HARMS}
    assert findings.checked > REQUESTS // 4
    assert findings.checked_quantized > REQUESTS // 6
