"""Triton's interpreter proves arithmetic, not that a kernel compiles: compile for a GPU, without one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPUTE_CAPABILITY = 90
STATES = ("fp32", "fp16", "bf16")


def compile_all() -> dict[str, str]:
    """PTX of both kernels for every format and dtype, each assembled by ptxas on the way."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spectrumkv.kernels import absmax_triton
    from spectrumkv.kernels.absmax import INT4, INT8

    assembly = {}
    for kernel in (absmax_triton._quantize_kernel, absmax_triton._dequantize_kernel):
        for states in STATES:
            for form, code_type in ((INT8, "i8"), (INT4, "u8")):
                constants = {"largest": form.largest, "packed": form == INT4, "rows": 32, "padded_half": 32}
                pointers = {
                    "states_ptr": f"*{states}",
                    "index_ptr": "*i64",
                    "codes_ptr": f"*{code_type}",
                    "scales_ptr": "*fp16",
                }
                names = kernel.arg_names
                constants = {name: value for name, value in constants.items() if name in names}
                signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
                source = ASTSource(kernel, signature, constexprs=constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32))
                if not compiled.asm["cubin"]:
                    raise SystemExit(f"ptxas made nothing of {kernel.__name__} for {states}, {form}")
                assembly[f"{kernel.__name__} {states} {form.bits}"] = compiled.asm["ptx"]
    return assembly


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists on Linux only")
def test_kernels_compile_and_divide_as_the_reference_does(tmp_path: Path) -> None:
    # A process of its own: this one has imported Triton as an interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    finished = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assembly = json.loads(finished.stdout)
    assert len(assembly) == 12
    for name, ptx in assembly.items():
        # Anything but rounding to nearest would make codes that differ from a CPU's by one.
        assert ("div.rn.f32" in ptx) == name.startswith("_quantize"), name
        assert "div.full" not in ptx, name
        assert "div.approx" not in ptx, name
        assert ".ftz" not in ptx, name


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all()))
