from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.kv.codecs.base import basis_types, codecs, parse_basis
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis, angles
from tests.common.kv.codecs.spectral_prompts import basis_of, geometry


def test_a_basis_is_read_without_knowing_its_type() -> None:
    shape = geometry()
    basis = basis_of(shape)
    [kind] = basis_types()
    assert len(basis.serialized) <= kind.largest_bytes(shape)
    read = parse_basis(basis.serialized, shape)
    assert type(read) is codecs.get("spectral").basis_type
    assert read.digest == basis.digest
    read.prepare_decoding()
    assert read.memory_bytes <= 2 * len(basis.serialized)
    with pytest.raises(InvalidArgumentError, match="no calibrated basis"):
        parse_basis(b"nonsense", shape)
    with pytest.raises(InvalidArgumentError, match="the model has"):
        parse_basis(basis.serialized, geometry(head_dim=32))
    flat = replace(basis, analysis=torch.zeros_like(basis.analysis))
    with pytest.raises(InvalidArgumentError, match="cannot be undone"):
        parse_basis(flat.serialized, shape).prepare_decoding()


@pytest.mark.parametrize(
    ("name", "rotation"),
    [
        # One rotation for all layers, as bases had it before layers could differ.
        ("rope_frequencies", torch.ones(8, dtype=torch.float64)),
        ("rope_scaling", torch.ones(1, dtype=torch.float64)),
        ("rope_frequencies", torch.ones(3, 8)),
        ("rope_frequencies", torch.full((3, 8), torch.nan, dtype=torch.float64)),
    ],
)
def test_a_basis_has_a_rotation_for_each_layer(name: str, rotation: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"basis's {name} is .*it must be torch.float64 \[3"):
        CalibratedBasis.from_bytes(save(load(basis_of(geometry()).serialized) | {name: rotation}))


@given(first=st.integers(0, 700), tokens=st.integers(1, 700))
def test_angles_are_those_of_the_positions(first: int, tokens: int) -> None:
    frequencies = (1.0, 0.37, 1e-4)
    turned = torch.arange(first, first + tokens).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    cosine, sine = angles(frequencies, first, tokens)
    torch.testing.assert_close(cosine, turned.cos().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sine, turned.sin().float(), rtol=0, atol=1e-6)


def test_a_basis_travels() -> None:
    basis = basis_of(geometry())
    back = CalibratedBasis.from_bytes(basis.serialized)
    assert back.digest == basis.digest
    assert torch.equal(back.analysis, basis.analysis)
    assert torch.equal(back.rope_frequencies, basis.rope_frequencies)
    assert torch.equal(back.rope_scaling, basis.rope_scaling)
    torch.testing.assert_close(
        basis.analysis @ basis.synthesis, torch.eye(16).expand_as(basis.analysis), atol=1e-4, rtol=0
    )
    with pytest.raises(InvalidArgumentError, match="no calibrated basis"):
        CalibratedBasis.from_bytes(b"nonsense")
    with pytest.raises(InvalidArgumentError, match=r"\(3, 2, 16\); the model has \(3, 2, 32\)"):
        basis.check_fits(geometry(head_dim=32))
