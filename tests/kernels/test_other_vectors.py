"""What is emitted for processors with shorter vectors than this one's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = (
    "test_small_products.py",
    "test_absmax_vectors.py",
    "test_decode_attention.py",
    "test_spectral_transform.py",
)
# LLVM is asked once, before anything is emitted.
RUN = """
import sys
from llvmlite import binding
from llvmlite.binding.targets import FeatureMap
binding.get_host_cpu_features = lambda: FeatureMap({feature: True for feature in sys.argv[2:]})
from spectrumkv.kernels.vectors import LANES
assert str(LANES) == sys.argv[1], LANES
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not gpu and not compiler", *SUITES]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [(8, "avx"), (4,)], ids=str)
def test_kernels_are_right_with_vectors_of_other_lengths(lanes: tuple[int | str, ...], tmp_path: Path) -> None:
    suites = [str(HERE / name) for name in SUITES]
    command = [sys.executable, "-c", RUN.replace("SUITES", repr(suites)), *map(str, lanes)]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
