"""`make demo` as users run it: real services, the embedded model."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_demo_answers_from_the_document_at_every_budget():
    command = [sys.executable, "-m", "spectrumkv.client.cli.main", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    answers = re.findall(r"^budget (\S+), \w+ policy ─*\n(.*)$", done.stdout, re.M)
    assert [budget for budget, _ in answers] == ["1", "0.5", "0.3"]
    assert all("Josiah Penrose" in answer for _, answer in answers)
    rows = re.findall(r"^ +(1|0\.5|0\.3)  +(\S+) +(\d\.\d{3}) ", done.stdout, re.M)
    assert rows[0][1] == "fp16"
    assert [float(counted) for _, _, counted in rows] == pytest.approx([1.0, 0.5, 0.3], abs=0.05)
