"""The short form of the soak: a few hundred requests, a worker killed or broken every ten seconds."""

import random
from pathlib import Path

import pytest

from tests.faults.report import tell
from tests.faults.soak.soak import Plan, soak

REQUESTS, HARM_SECONDS = 300, 10.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_short_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(REQUESTS, HARM_SECONDS, random.SystemRandom().randrange(1 << 32))
    findings = soak(plan, tmp_path)
    tell(capsys, findings.sentence(plan))
    assert findings.wrong == []
    assert findings.harms
    assert findings.checked > REQUESTS // 4
    assert findings.checked_quantized > REQUESTS // 6
