"""Triton's interpreter proves arithmetic, not that a kernel compiles: compile all for a GPU, without one."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

COMPUTE_CAPABILITY = 90
STATES = ("fp32", "fp16", "bf16")
# Triton compiles numbers that are 1 into a kernel.
ADJACENT = {"key_stride_element": 1, "value_stride_element": 1}
# Shared memory that a program has on GPUs from Ampere's on, the small ones too.
SHARED_BYTES = 99 << 10


def absmax_kernels() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str]]]:
    """Name, kernel, constants, and types of what is no int32."""
    from spectrumkv.kernels.absmax import triton_kernels

    for direction in ("encode", "decode"):
        for states in STATES:
            constants = {
                "code_rows": getattr(triton_kernels, f"{direction}_rows"),
                "half": 64, "padded_half": 64, "alignment": 16, "rows": 16, **ADJACENT,
            }  # fmt: skip
            types = {
                "keys_ptr": f"*{states}",
                "values_ptr": f"*{states}",
                "tiers_ptr": "*u8",
                "places_ptr": "*i32",
                "segments_ptr": "*i64",
                "offsets_ptr": "*i64",
                "floats_ptr": "*bf16" if states == "bf16" else "*fp16",
                "scales_ptr": "*fp16",
                "codes_ptr": "*u8",
                "broken_ptr": "*u8",
            }
            yield f"absmax {direction} {states}", triton_kernels.absmax_kernel, constants, types


def other_kernels() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str]]]:
    """Scores, copies and places; see `absmax_kernels`."""
    import torch

    from spectrumkv.kernels.attention_scores import triton as attention_scores
    from spectrumkv.kernels.native import triton as native
    from spectrumkv.kernels.tier_placement import triton as tier_placement

    for states in STATES:
        for capped in (False, True):
            constants = {
                "capped": capped, "group": 4, "head_dim": 128, "padded_dim": 128, "in_float32": False,
                "block_queries": attention_scores.BLOCK_QUERIES, "block_tokens": attention_scores.BLOCK_TOKENS,
            }  # fmt: skip
            types = {
                "queries_ptr": f"*{states}",
                "keys_ptr": f"*{states}",
                "softmax_ptr": "*fp32",
                "scores_ptr": "*fp32",
                "scaling": "fp32",
                "softcap": "fp32",
            }
            name = f"{states} {capped}"
            yield f"softmax {name}", attention_scores._softmax_kernel, constants, types
            splits = constants | {"splits": attention_scores.SPLITS}
            yield (
                f"scores {name}",
                attention_scores._scores_kernel,
                splits | ({"kv_heads": 1} if capped else {}),
                types,
            )
    for encodes in (False, True):
        for bits in ("i16", "i32"):
            constants = {
                "encodes": encodes,
                "infinity": native.INFINITY_BITS[torch.float16 if bits == "i16" else torch.float32],
                "head_dim": 128, "padded_dim": 128, "rows": 32, **ADJACENT,
            }  # fmt: skip
            pointers = {"keys_ptr": f"*{bits}", "values_ptr": f"*{bits}", "bodies_ptr": f"*{bits}"}
            types = pointers | {"places_ptr": "*i64", "broken_ptr": "*u8"}
            yield f"native {encodes} {bits}", native.native_kernel, constants, types
    types = {
        "scores_ptr": "*fp32", "found_ptr": "*i64", "segments_ptr": "*i64", "places_ptr": "*i32", "tiers_ptr": "*u8"
    }  # fmt: skip
    constants = {"block_tokens": tier_placement.BLOCK_TOKENS}
    yield "place", tier_placement._place_kernel, constants, types


def fixed_rate_kernels() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str]]]:
    """What codes layers in fixed_rate, and writes slots; see `absmax_kernels`."""
    from spectrumkv.kernels.fixed_rate.triton import tiles
    from spectrumkv.kernels.fixed_rate.triton.decoding import decode, synthesis, unpacking
    from spectrumkv.kernels.fixed_rate.triton.encoding import analysis, encode, packing, statistics

    floats = dict.fromkeys(
        [
            "cosine_ptr", "sine_ptr", "mean_ptr", "analysis_ptr", "synthesis_ptr", "scale_ptr", "scaling_ptr",
            "coefficients_ptr", "energies_ptr", "scores_ptr", "row_means_ptr", "means_ptr", "inverse_ptr",
            "stds_ptr", "powers_ptr", "limits_ptr", "level_ptr",
        ],
        "*fp32",
    )  # fmt: skip
    scalars = ["inverse_scaling", "exponent", "drift", "drift_weight", "smooth_base", "base_weight"]
    types = floats | dict.fromkeys(scalars, "fp32") | {
        "found_ptr": "*i64", "tiles_ptr": "*i64", "bodies_ptr": "*u8",
    }  # fmt: skip
    integers = [
        "gains_ptr", "exponents_ptr", "drops_ptr", "order_ptr", "ranks_ptr", "groups_ptr", "histograms_ptr",
        "steps_ptr", "starts_ptr", "counters_ptr", "calibrated_ptr", "calibrated_groups_ptr", "later_ptr",
        "thresholds_ptr", "borders_ptr", "words_ptr", "bits_ptr", "offset_ptr", "slope_ptr", "tokens_ptr",
    ]  # fmt: skip
    types |= dict.fromkeys(integers, "*i32")
    rows = {"rows": 2048, "groups": 64, "block_groups": tiles.BLOCK_GROUPS}
    for states in STATES:
        half = {"halves_ptr": "*bf16" if states == "bf16" else "*fp16"}
        pointers = half | {"keys_ptr": f"*{states}", "values_ptr": f"*{states}"}
        for head_dim in (128, 256):
            constants = {
                "kv_heads": 8, "half": head_dim // 2, "padded_half": head_dim // 2, **ADJACENT,
            }  # fmt: skip
            constants |= dict(zip(("block_tokens", "block_columns"), tiles.tile_of(head_dim), strict=True))
            name = f"{states} {head_dim}"
            yield f"analyse {name}", analysis.analyse_kernel, constants, types | pointers
            yield f"synthesise {name}", synthesis.synthesise_kernel, constants, types | pointers
    constants = rows | {
        "heads": 16, "block_rows": encode.STATISTICS_ROWS, "block_tokens": encode.STATISTICS_TOKENS,
        "block_layer": encode.LAYER_TOKENS,
    }  # fmt: skip
    yield "statistics", statistics.statistics_kernel, constants, types | {"halves_ptr": "*bf16"}
    constants = rows | {"padded_words": 64, "block_tokens": 16}
    yield "pack", packing.pack_kernel, constants, types | {"tokens_ptr": "*u8"}
    yield "unpack", unpacking.unpack_kernel, rows | {"block_escapes": decode.BLOCK_ESCAPES}, types


def compile_all() -> dict[str, str]:
    """PTX of every kernel, each assembled by ptxas on the way."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assembly = {}
    for name, kernel, constants, types in (*absmax_kernels(), *other_kernels(), *fixed_rate_kernels()):
        signature = {one: "constexpr" if one in constants else types.get(one, "i32") for one in kernel.arg_names}
        # Torch's memory begins at multiples of 16 bytes, and strides are multiples of a head's elements.
        divisible = {
            (number,): [["tt.divisibility", 16]]
            for number, one in enumerate(kernel.arg_names)
            if signature[one].startswith("*") or "stride" in one
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
        # As `encode._pack` launches it.
        options = {"enable_fp_fusion": False} if name == "pack" else None
        compiled = triton.compile(source, target=GPUTarget("cuda", COMPUTE_CAPABILITY, 32), options=options)
        if not compiled.asm["cubin"] or compiled.metadata.shared > SHARED_BYTES:
            raise SystemExit(f"{name}: ptxas made nothing of it, or it takes {compiled.metadata.shared} shared bytes")
        assembly[name] = compiled.asm["ptx"]
    return assembly


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists on Linux only")
@pytest.mark.timeout(900)
def test_kernels_compile_and_divide_as_the_reference_does(tmp_path: Path) -> None:
    # A process of its own: this one has imported Triton as an interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    finished = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assembly = json.loads(finished.stdout)
    assert len(assembly) == 6 + 12 + 4 + 1 + 15
    for name, ptx in assembly.items():
        # Anything but rounding to nearest would make codes that differ from a CPU's by one.
        if name.startswith("absmax"):
            assert ("div.rn.f32" in ptx) == name.startswith("absmax encode"), name
            assert "div.full" not in ptx, name
            assert "div.approx" not in ptx, name
            assert ".ftz" not in ptx, name
        # Records are to be those of a CPU: nothing is flushed, fused or divided.
        if name == "pack":
            assert ".ftz" not in ptx
            assert "fma.rn.f32" not in ptx
            assert "div.full" not in ptx
        # The last program reads what the others wrote: it relies on this order.
        if name in ("pack", "statistics"):
            assert ptx.count("atom.global.gpu.acq_rel.add") == (1 if name == "pack" else 2), name
        # Products of float32 are those of tensor cores, each made of three.
        if name.startswith(("analyse", "synthesise")):
            assert "mma" in ptx, name
        # Products of 16-bit numbers are those of tensor cores.
        if name.startswith(("softmax", "scores")) and "fp32" not in name:
            assert "mma" in ptx, name


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compile_all()))
