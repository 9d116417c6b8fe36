"""What `prepare` compiles is all that requests need."""

import subprocess
import sys

import pytest

# In a process of its own: what other tests had compiled would hide what is missing.
REQUEST = """
import torch
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateDecoder, prepare
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.segment import parse_segment
from spectrumkv.kernels.fixed_rate import rate, records, transform
from tests.common.kv.codecs.spectral_prompts import basis_of, geometry, capture

def signatures():
    loops = vars(transform) | vars(records) | vars(rate)
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
        request = CalibratedRequest(basis, shape, tokens, int(0.4 * shape.fp16_bytes(tokens)), "attention", 0)
        for segment in FixedRateEncoder(request).encode(seen):
            payload = segment.header + segment.body.numpy().tobytes()
            slots = torch.empty(2, shape.kv_heads, 2 * tokens, shape.head_dim)[:, :, tokens:]
            FixedRateDecoder(basis, shape).decode(parse_segment(payload, 0)[0], slots[0], slots[1])
print(sorted(map(str, signatures() - prepared)))
"""


@pytest.mark.slow
def test_no_request_waits_for_a_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", REQUEST], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "[]"
