"""Harmed bodies of fixed rate: the decoder returns or raises DataLossError, within its arrays.

Compiled loops do not check bounds, so such bodies are also decoded by a process in which numba does.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.hostile.decoders.attack_fixed_rate import HARMS, attack
from tests.faults.report import tell

SHORT_RUN, BOUNDS_CHECKED_RUN = 1500, 20_000


def test_harmed_bodies_are_decoded_or_refused() -> None:
    tried = attack(SHORT_RUN, seed=1)
    assert min(tried[kind] for kind in HARMS) > SHORT_RUN // 10
    assert SHORT_RUN // 50 < tried["decoded"] < SHORT_RUN // 2
    assert tried["refused: length"] > SHORT_RUN // 20


@pytest.mark.slow
def test_compiled_loops_stay_within_their_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    module = "tests.faults.hostile.decoders.attack_fixed_rate"
    command = [sys.executable, "-m", module, str(BOUNDS_CHECKED_RUN), str(seed)]
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    tell(capsys, done.stdout.strip())
