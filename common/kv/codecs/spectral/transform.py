"""One layer's keys and values to quantized coefficients and back.

The transform is a Karhunen-Loève transform (principal component analysis) per layer, side and head, in a metric that
the calibration found; the quantizer is uniform with a step per token.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from spectrumkv.common.kv.codecs.calibrated.layer import CalibratedLayer
from spectrumkv.common.kv.codecs.spectral.coefficients import (
    FEWEST_TOKENS,
    CoefficientModel,
    Deviation,
    Quantization,
)
from spectrumkv.kernels.jit.strided import adjacent, flat, padded_matrices, written_rows
from spectrumkv.kernels.spectral import transform as kernels
from spectrumkv.kernels.spectral.moments import add_moments

# Tokens at most by which a segment's means and standard deviations are measured: no more than a loop takes at a time.
SAMPLE = 128


@dataclass(frozen=True, eq=False)
class LayerTransform(CalibratedLayer):
    """The transform of one layer's tokens, as codec spectral computes it."""

    @cached_property
    def calibrated(self) -> CoefficientModel:
        """Return what the basis says of the coefficients."""
        return CoefficientModel.calibrated(self.std)

    def deviation(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> Deviation | None:
        """Measure how the coefficients of some tokens differ from the calibrated ones, by `SAMPLE` of them at most.

        Args:
            keys: see `quantize`.
            values: like `keys`.
            first: position of the first token.

        Returns:
            The deviation; None where the tokens are few, or states are infinite, NaN or too large to be squared.
        """
        tokens = keys.shape[1]
        if tokens < FEWEST_TOKENS:
            return None
        sample = np.linspace(0, tokens - 1, min(tokens, SAMPLE)).astype(np.int64)
        sums, squares = np.empty((2, *self._mean.shape))
        add_moments(
            flat(adjacent(keys.float())),
            flat(adjacent(values.float())),
            sample,
            self._rotation(first, tokens, 1 / self.rope_scaling),
            self._mean,
            self._analysis,
            sums,
            squares,
        )
        if not np.isfinite(squares).all():
            return None
        return Deviation.measured(self.calibrated, sums.ravel(), squares.ravel(), len(sample))

    def quantize(
        self, keys: torch.Tensor, values: torch.Tensor, first: int, quantization: Quantization
    ) -> tuple[np.ndarray, float]:
        """Compute coefficients in units of their tokens' steps, rounded.

        Args:
            keys: `[kv_heads, n, head_dim]` on the CPU, after the rotary embedding; of the tokens that have a step.
            values: like `keys`.
            first: position of the first token.
            quantization: of the tokens.

        Returns:
            int32 `[symbols]`, one stream after another, and the largest magnitude of a coefficient: infinite or NaN
            where one is. The symbols of coefficients of 2^31 steps or more are meaningless.
        """
        tokens, symbols = quantization.tokens, np.empty(quantization.packed.start[-1], np.int32)
        largest = kernels.analyse(
            flat(adjacent(keys.float())),
            flat(adjacent(values.float())),
            tokens.order,
            self._rotation(first, keys.shape[1], 1 / self.rope_scaling),
            self._center(quantization.model),
            self._analysis,
            tokens.start,
            1 / quantization.steps,
            quantization.offsets,
            quantization.in_trellis,
            symbols,
        )
        return symbols, float(np.int32(largest).view(np.float32))

    def dequantize(
        self,
        symbols: np.ndarray,
        first: int,
        quantization: Quantization,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write keys, after the rotary embedding, and values: the inverse of `quantize`.

        Args:
            symbols: int32 `[symbols]`.
            first: position of the first token.
            quantization: of the tokens.
            keys: `[kv_heads, n, head_dim]`, any dtype, strides and device.
            values: like `keys`.
        """
        with written_rows(keys) as key_rows, written_rows(values) as value_rows:
            kernels.synthesise(
                symbols,
                quantization.tokens.order,
                self._rotation(first, keys.shape[1], self.rope_scaling),
                self._center(quantization.model),
                self._synthesis,
                quantization.tokens.start,
                quantization.steps,
                quantization.offsets,
                quantization.in_trellis,
                flat(key_rows),
                flat(value_rows),
            )

    def _rotation(self, first: int, tokens: int, scaling: float) -> tuple[np.ndarray, np.ndarray, np.float32]:
        cosine, sine = self.basis.rotation(self.layer, first, tokens)
        return cosine.numpy(), sine.numpy(), np.float32(scaling)

    def _center(self, model: CoefficientModel) -> np.ndarray:
        """Return the state whose coefficients are the model's means: float32 `[2 · kv_heads, head_dim]`."""
        if model is self.calibrated:
            return self._mean
        heads, head_dim, _ = self._synthesis.shape
        shift = model.mean.reshape(heads, 1, head_dim) @ self._synthesis[:, :, :head_dim]
        center: np.ndarray = self._mean + shift[:, 0]
        return center

    @cached_property
    def _mean(self) -> np.ndarray:
        """Return the mean, float32 `[2 · kv_heads, head_dim]`."""
        mean: np.ndarray = self.basis.mean[self.layer].flatten(0, 1).numpy()
        return mean

    @cached_property
    def _analysis(self) -> np.ndarray:
        """Return `analysis`, float32 `[2 · kv_heads, head_dim, padded]`, a column for each coefficient."""
        return padded_matrices(self.basis.analysis[self.layer])

    @cached_property
    def _synthesis(self) -> np.ndarray:
        """Return `synthesis`, float32 `[2 · kv_heads, head_dim, padded]`, a row for each coefficient."""
        return padded_matrices(self.basis.synthesis[self.layer])
