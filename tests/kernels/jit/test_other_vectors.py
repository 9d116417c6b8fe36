"""What is emitted for processors with shorter vectors than this one's."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from spectrumkv.kernels.jit.llvm import X86

HERE = Path(__file__).parents[1]
HASWELL = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2"
SUITES = (
    "jit/test_gemm.py",
    "absmax/test_cpu_vectors.py",
    "decode_attention/test_decode_attention.py",
    "spectral/test_transform.py",
    "fixed_rate/test_records.py",
)
# LLVM is asked once, before anything is emitted.
RUN = """
import sys
from llvmlite import binding
from llvmlite.binding.targets import FeatureMap
binding.get_host_cpu_features = lambda: FeatureMap({feature: True for feature in sys.argv[2:]})
from spectrumkv.kernels.jit.llvm import LANES
assert str(LANES) == sys.argv[1], LANES
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not gpu and not compiler", *SUITES]))
"""


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in X86, reason="makes code for processors of x86")
@pytest.mark.parametrize("lanes", [(8, "avx", "f16c"), (4, "f16c")], ids=str)
def test_kernels_are_right_with_vectors_of_other_lengths(lanes: tuple[int | str, ...], tmp_path: Path) -> None:
    """Code of what has vectors of 8 is made for such a processor; none with 4 has instructions for float16."""
    suites = [str(HERE / name) for name in SUITES]
    command = [sys.executable, "-c", RUN.replace("SUITES", repr(suites)), *map(str, lanes)]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    if "avx" in lanes:
        environment |= {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": HASWELL}
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
