"""What `prepare` compiles is all that requests need."""

import subprocess
import sys

import pytest
import torch

from spectrumkv.common.kv.codecs import codecs, prepare_codecs
from spectrumkv.common.kv.geometry import KvGeometry

# In a process of its own: what other tests had compiled would hide what is missing.
REQUEST = """
import torch
from spectrumkv.common.kv.codecs.spectral.codec import SpectralDecoder, prepare
from spectrumkv.common.kv.segment import parse_segment
from spectrumkv.kernels.spectral import packing, rate, streams, transform
from tests.common.kv.codecs.spectral_prompts import basis_of, encoder_of, geometry, capture

def signatures():
    loops = vars(transform) | vars(streams) | vars(packing) | vars(rate)
    return {(name, one) for name, loop in loops.items() for one in getattr(loop, "signatures", ())}

prepare()
prepared = signatures()
shape = geometry()
basis = basis_of(shape)
for tokens, mismatch in ((1, 1.0), (40, 1.0), (300, 30.0)):
    for layer in range(shape.layers):
        seen = capture(basis, layer, tokens, mismatch)
        # As models leave them: token by token.
        for states in (seen.keys, seen.values):
            states.set_(states.transpose(0, 1).contiguous().transpose(0, 1))
        for segment in encoder_of(basis, shape, tokens, 0.4).encode(seen):
            payload = segment.header + segment.body.numpy().tobytes()
            slots = torch.empty(2, shape.kv_heads, 2 * tokens, shape.head_dim)[:, :, tokens:]
            SpectralDecoder(basis, shape).decode(parse_segment(payload, 0)[0], slots[0], slots[1])
print(sorted(map(str, signatures() - prepared)))
"""


@pytest.mark.slow
def test_no_request_waits_for_a_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", REQUEST], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"


def test_every_codec_is_prepared_for_the_models_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = KvGeometry(layers=2, kv_heads=1, head_dim=8, native_dtype=torch.float32)
    prepared: list[tuple[str, KvGeometry]] = []
    for kind in (type(codecs.get(name)) for name in codecs):
        monkeypatch.setattr(kind, "prepare", lambda self, shape: prepared.append((self.name, shape)))
    prepare_codecs(geometry)
    assert prepared == [(name, geometry) for name in codecs]
