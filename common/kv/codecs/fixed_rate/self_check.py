"""Checks the kernels of codec fixed_rate on the GPU at hand against the loops for CPUs, before a service is ready.

What Triton compiles differs between GPUs and between versions of it. A kernel that is wrong there would damage every
answer, and no checksum would see it. So prefill codes a small prompt on the GPU, and decode writes one into its
slots. Where the CPU's loops come to anything else, loops code from then on.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from spectrumkv.common.kv.capture import LayerCapture
from spectrumkv.common.kv.codecs.calibrated.basis import CalibratedBasis, identity_basis
from spectrumkv.common.kv.codecs.calibrated.request import CalibratedRequest
from spectrumkv.common.kv.codecs.fixed_rate.codec import FixedRateDecoder
from spectrumkv.common.kv.codecs.fixed_rate.encoder import FixedRateEncoder
from spectrumkv.common.kv.codecs.fixed_rate.kernel_fault import note_fault
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.kv.segment import KvSegment

# Layers of the small prompt: the last one is coded in another way than those before it.
LAYERS = 2
TOKENS = 14
# Of FP16's bytes: segments of few tokens then have scales of their own, too.
BUDGET = 0.9
# How much larger than the loops' a kernel's squared error may be: rounded in a last bit, a step may differ.
ERROR_RATIO = 1.2
# How far its bytes may be from the loops', of these.
SIZE_TOLERANCE = 0.03
# How far elements that decode writes may be off, relative to the largest one: at least, and in steps of the dtype.
LEAST_TOLERANCE, STEPS = 1e-4, 4


def check_encoding(captures: Sequence[LayerCapture], geometry: KvGeometry) -> None:
    """Code layers of a model on its GPU, then a small prompt there and on the CPU; note it where they differ.

    Args:
        captures: layers of one prompt, on a GPU, that differ in what kernels are compiled for.
        geometry: shape and dtype of the model's cache.
    """
    layers = replace(geometry, layers=LAYERS)

    def fault() -> str:
        for capture in captures:
            for _ in _encoder(identity_basis(layers), layers, capture.tokens).encode(replace(capture, layer=0)):
                pass
        return _encoding_fault(captures[0], layers)

    _note(fault)


def check_decoding(slots: Sequence[tuple[torch.Tensor, torch.Tensor]], geometry: KvGeometry) -> None:
    """Write a small prompt into slots on a GPU and into memory of the CPU, and note it where they differ.

    Args:
        slots: keys and values of one or two layers, each `[kv_heads, n, head_dim]` in the model's own dtype, views of
            slots that nobody holds; written.
        geometry: shape and dtype of the model's cache.
    """
    layers = replace(geometry, layers=len(slots))
    _note(lambda: _decoding_fault(slots, layers))


def _note(find: Callable[[], str]) -> None:
    try:
        fault = find()
    except Exception as error:  # noqa: BLE001  # whatever a compiler or a driver raises
        fault = f"{type(error).__name__}: {error}"
    if fault:
        note_fault(fault)


def _encoding_fault(like: LayerCapture, layers: KvGeometry) -> str:
    """Return how what is coded on a GPU differs from what is coded on the CPU; nothing where it does not."""
    basis = _basis(layers)
    prompt = _prompt(basis, layers, TOKENS, like)
    there = [_on(capture, like.keys.device) for capture in prompt]
    coded, expected = _coded(basis, layers, there), _coded(basis, layers, prompt)
    size, expected_size = (sum(one.wire_bytes for one in segments) for segments in (coded, expected))
    if abs(size - expected_size) > SIZE_TOLERANCE * expected_size:
        return f"a prompt takes {size} bytes where loops of the CPU make {expected_size}"
    error, expected_error = (_squared_error(basis, layers, prompt, one) for one in (coded, expected))
    if not error <= ERROR_RATIO * expected_error:
        return (
            f"a prompt is coded with a squared error of {error:.3g} where loops of the CPU leave {expected_error:.3g}"
        )
    return ""


def _decoding_fault(slots: Sequence[tuple[torch.Tensor, torch.Tensor]], layers: KvGeometry) -> str:
    """Return how what is written on a GPU differs from what is written on the CPU; nothing where it does not."""
    basis = _basis(layers)
    tokens = slots[0][0].shape[1]
    segments = _coded(basis, layers, _prompt(basis, layers, tokens))
    views = [_of_segment(slots[one.layer], one) for one in segments]
    FixedRateDecoder(basis, layers).decode_all(segments, views)
    written = torch.stack([torch.stack(list(one)).cpu() for one in slots])
    expected = _decoded(basis, layers, segments, tokens)
    tolerance = max(LEAST_TOLERANCE, STEPS * torch.finfo(layers.native_dtype).eps) * float(expected.abs().max())
    difference = float((written.float() - expected.float()).abs().max())
    if not difference <= tolerance:
        return f"slots differ by {difference:.3g} from what loops of the CPU write, where {tolerance:.3g} are allowed"
    return ""


def _basis(layers: KvGeometry) -> CalibratedBasis:
    """Return a basis that mirrors states at a vector, so that all of its elements count."""
    plain, dim = identity_basis(layers), layers.head_dim
    vector = torch.arange(1.0, dim + 1) / torch.arange(1.0, dim + 1).norm()
    mirror = torch.eye(dim) - 2 * torch.outer(vector, vector)
    return CalibratedBasis(
        mean=torch.full_like(plain.mean, 0.25),
        analysis=mirror.expand_as(plain.analysis).contiguous(),
        std=torch.exp2(-4 * torch.arange(dim) / dim).expand_as(plain.std).contiguous(),
        attention_exponent=plain.attention_exponent,
        rope_frequencies=plain.rope_frequencies,
        rope_scaling=plain.rope_scaling,
    )


def _prompt(
    basis: CalibratedBasis, layers: KvGeometry, tokens: int, like: LayerCapture | None = None
) -> list[LayerCapture]:
    """Return layers on the CPU whose coefficients have the standard deviations that the basis says.

    Args:
        basis: of the layers.
        layers: shape and dtype.
        tokens: of the prompt.
        like: has as many queries of as many heads; None for a query of each head.
    """
    heads, window = (layers.kv_heads, 1) if like is None else like.queries.shape[:2]
    generator = torch.Generator().manual_seed(tokens)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    prompt = []
    for layer in range(layers.layers):
        coefficients = drawn(2, layers.kv_heads, tokens, layers.head_dim) * basis.std[layer][:, :, None]
        # A token that is unlike the others, so that coefficients escape.
        coefficients[:, :, tokens // 2] *= 40
        states = (coefficients @ basis.synthesis[layer] + basis.mean[layer][:, :, None]).to(layers.native_dtype)
        queries = drawn(heads, min(window, tokens), layers.head_dim).to(layers.native_dtype)
        prompt.append(LayerCapture(queries, states[0], states[1], layers.head_dim**-0.5, None, None, layer))
    return prompt


def _on(capture: LayerCapture, device: torch.device) -> LayerCapture:
    queries, keys, values = (one.to(device) for one in (capture.queries, capture.keys, capture.values))
    return replace(capture, queries=queries, keys=keys, values=values)


def _encoder(basis: CalibratedBasis, layers: KvGeometry, tokens: int) -> FixedRateEncoder:
    request = CalibratedRequest(basis, layers, tokens, int(BUDGET * layers.fp16_bytes(tokens)), "attention", 0)
    return FixedRateEncoder(request)


def _coded(basis: CalibratedBasis, layers: KvGeometry, prompt: Sequence[LayerCapture]) -> list[KvSegment]:
    encoder = _encoder(basis, layers, prompt[0].tokens)
    return [segment for capture in prompt for segment in encoder.encode(capture)]


def _decoded(basis: CalibratedBasis, layers: KvGeometry, segments: Sequence[KvSegment], tokens: int) -> torch.Tensor:
    """Return what loops of the CPU make of segments: `[layers, 2, kv_heads, tokens, head_dim]`."""
    shape = (layers.layers, 2, layers.kv_heads, tokens, layers.head_dim)
    states = torch.zeros(shape, dtype=layers.native_dtype)
    decoder = FixedRateDecoder(basis, layers)
    for segment in segments:
        keys, values = states[segment.layer]
        decoder.decode(segment, *_of_segment((keys, values), segment))
    return states


def _of_segment(states: tuple[torch.Tensor, torch.Tensor], segment: KvSegment) -> tuple[torch.Tensor, torch.Tensor]:
    span = slice(segment.first_token, segment.first_token + segment.tiers.numel())
    return states[0][:, span], states[1][:, span]


def _squared_error(
    basis: CalibratedBasis, layers: KvGeometry, prompt: Sequence[LayerCapture], segments: Sequence[KvSegment]
) -> float:
    exact = torch.stack([torch.stack([one.keys, one.values]) for one in prompt]).float()
    return float((_decoded(basis, layers, segments, prompt[0].tokens).float() - exact).square().mean())
