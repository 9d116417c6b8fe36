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
    """PTX of the kernel in both directions for every dtype, each assembled by ptxas on the way."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from spectrumkv.kernels.absmax import triton as absmax_triton

    assembly = {}
    kernel = absmax_triton._kernel
    for direction in ("encode", "decode"):
        for states in STATES:
            constants = {
                "code_tile": getattr(absmax_triton, f"_{direction}_tile"),
                "half": 64, "padded_half": 64, "alignment": 16, "rows": 16,
            }  # fmt: skip
            pointers = {
                "keys_ptr": f"*{states}",
                "values_ptr": f"*{states}",
                "order_ptr": "*i32",
                "tiles_ptr": "*i32",
                "floats_ptr": "*bf16" if states == "bf16" else "*fp16",
                "scales_ptr": "*fp16",
                "codes_ptr": "*u8",
            }
            signature = {
                name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
            }
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32))
            if not compiled.asm["cubin"]:
                raise SystemExit(f"ptxas made nothing of {direction} for {states}")
            assembly[f"{direction} {states}"] = compiled.asm["ptx"]
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
    assert len(assembly) == 6
    for name, ptx in assembly.items():
        # Anything but rounding to nearest would make codes that differ from a CPU's by one.
        assert ("div.rn.f32" in ptx) == name.startswith("encode"), name
        assert "div.full" not in ptx, name
        assert "div.approx" not in ptx, name
        assert ".ftz" not in ptx, name


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all()))
