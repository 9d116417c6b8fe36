"""One layer's keys and values to quantized coefficients and back.

The transform is a Karhunen-Loève transform (principal component analysis) per layer, side and head, in a metric that
the calibration found; the quantizer is uniform with a step per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.kv.codecs.spectral.layout import (
    CLASSES_PER_OCTAVE,
    Steps,
    StreamLayout,
    mean_bits,
    std_classes,
)
from spectrumkv.common.kv.codecs.spectral.symbols import PackedStreams
from spectrumkv.kernels.jit.gemm import padded
from spectrumkv.kernels.jit.strided import adjacent, flat
from spectrumkv.kernels.spectral import transform as kernels
from spectrumkv.kernels.spectral.streams import offsets


@dataclass(frozen=True, eq=False)
class LayerTransform:
    """The transform of one layer's tokens, with coefficients sorted by class of standard deviation.

    A row is one coefficient of one head in all tokens; keys' heads come first.

    Attributes:
        basis: of the model.
        layer: from 0.
    """

    basis: SpectralBasis
    layer: int

    @cached_property
    def _classes(self) -> np.ndarray:
        """Return the class of each row, in the order side, head, element."""
        return std_classes(self.basis.std[self.layer].flatten().numpy())

    @cached_property
    def row_order(self) -> np.ndarray:
        """Sort the rows by rising class, those of one class in the order side, head, element: int64 `[rows]`."""
        return np.argsort(self._classes, kind="stable")

    @cached_property
    def run_classes(self) -> np.ndarray:
        """Return the classes that rows have, rising: int64 `[runs]`."""
        return np.unique(self._classes)

    @cached_property
    def run_start(self) -> np.ndarray:
        """Return where each class starts in `row_order`: int64 `[runs + 1]`."""
        edges = np.searchsorted(self._classes[self.row_order], self.run_classes)
        return np.append(edges, len(self.row_order)).astype(np.int64)

    @cached_property
    def run_rows(self) -> np.ndarray:
        """Count the rows of each class: int64 `[runs]`."""
        return np.diff(self.run_start)

    @cached_property
    def streams(self) -> StreamLayout:
        """Lay out which symbols share a stream."""
        return StreamLayout.of(self.run_classes, self.run_rows)

    @cached_property
    def _run_exponents(self) -> np.ndarray:
        """Return the binary logarithm of each class's standard deviation: float64 `[runs]`."""
        return self.run_classes / CLASSES_PER_OCTAVE

    def mean_bits(self, steps: np.ndarray) -> np.ndarray:
        """Estimate the bits an element that tokens of several steps take.

        Args:
            steps: float64 `[n]`, binary logarithms of the steps.

        Returns:
            float64 `[n]`, bits.
        """
        return mean_bits(self._run_exponents, steps, self.run_rows)

    def packed(self, steps: Steps) -> PackedStreams:
        """Choose how the streams of tokens with these steps are packed.

        Args:
            steps: of the tokens.

        Returns:
            A packing for each stream.
        """
        return self.streams.packed(steps.tokens.of_each, steps.base)

    def quantize(
        self, keys: torch.Tensor, values: torch.Tensor, first: int, steps: Steps, packed: PackedStreams
    ) -> tuple[np.ndarray, float]:
        """Compute coefficients in units of their tokens' steps, rounded.

        Args:
            keys: `[kv_heads, n, head_dim]` on the CPU, after the rotary embedding; of the tokens that have a step.
            values: like `keys`.
            first: position of the first token.
            steps: of the tokens.
            packed: see `packed`.

        Returns:
            int32 `[symbols]`, one stream after another, and the largest magnitude of a coefficient: infinite or NaN
            where one is. The symbols of coefficients of 2^31 steps or more are meaningless.
        """
        symbols = np.empty(packed.start[-1], np.int32)
        largest = kernels.analyse(
            flat(adjacent(keys.float())),
            flat(adjacent(values.float())),
            steps.tokens.order,
            self._rotation(first, keys.shape[1], 1 / self._rope_scaling),
            self._mean,
            self._analysis,
            steps.tokens.start,
            1 / steps.of_classes,
            self._offsets(steps, packed),
            symbols,
        )
        return symbols, float(np.int32(largest).view(np.float32))

    def dequantize(
        self,
        symbols: np.ndarray,
        packed: PackedStreams,
        first: int,
        steps: Steps,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Write keys, after the rotary embedding, and values: the inverse of `quantize`.

        Args:
            symbols: int32 `[symbols]`.
            packed: see `packed`.
            first: position of the first token.
            steps: of the tokens.
            keys: `[kv_heads, n, head_dim]`, any dtype, strides and device.
            values: like `keys`.
        """
        with _written_rows(keys) as key_rows, _written_rows(values) as value_rows:
            kernels.synthesise(
                symbols,
                steps.tokens.order,
                self._rotation(first, keys.shape[1], self._rope_scaling),
                self._mean,
                self._synthesis,
                steps.tokens.start,
                steps.of_classes,
                self._offsets(steps, packed),
                flat(key_rows),
                flat(value_rows),
            )

    def _rotation(self, first: int, tokens: int, scaling: float) -> tuple[np.ndarray, np.ndarray, np.float32]:
        cosine, sine = self.basis.rotation(self.layer, first, tokens)
        return cosine.numpy(), sine.numpy(), np.float32(scaling)

    def _offsets(self, steps: Steps, packed: PackedStreams) -> np.ndarray:
        """Return where the symbols of each step class and row start: int64 `[classes, rows]`."""
        starts = np.empty((len(steps.tokens.of_each), len(self.row_order)), np.int64)
        offsets(self.row_order, self.run_start, steps.tokens.start, self.streams.stream_of, packed.start, starts)
        return starts

    @cached_property
    def _rope_scaling(self) -> float:
        return float(self.basis.rope_scaling[self.layer])

    @cached_property
    def _mean(self) -> np.ndarray:
        """Return the mean, float32 `[2 · kv_heads, head_dim]`."""
        mean: np.ndarray = self.basis.mean[self.layer].flatten(0, 1).numpy()
        return mean

    @cached_property
    def _analysis(self) -> np.ndarray:
        """Return `analysis`, float32 `[2 · kv_heads, head_dim, padded]`, a column for each coefficient."""
        return _padded(self.basis.analysis[self.layer])

    @cached_property
    def _synthesis(self) -> np.ndarray:
        """Return `synthesis`, float32 `[2 · kv_heads, head_dim, padded]`, a row for each coefficient."""
        return _padded(self.basis.synthesis[self.layer])


@lru_cache(maxsize=4)
def layer_transforms(basis: SpectralBasis) -> tuple[LayerTransform, ...]:
    """Return the transforms of all layers; requests that use one basis share them."""
    return tuple(LayerTransform(basis, layer) for layer in range(basis.mean.shape[0]))


def _padded(matrices: torch.Tensor) -> np.ndarray:
    """Return `[2, kv_heads, d, d]` with as many columns as compiled loops want: `[2 · kv_heads, d, padded]`."""
    columns = matrices.shape[-1]
    wide = torch.nn.functional.pad(matrices.flatten(0, 1), (0, padded(columns) - columns))
    memory: np.ndarray = wide.contiguous().numpy()
    return memory


@contextmanager
def _written_rows(states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Lend memory that compiled loops can write to.

    Yields:
        The states themselves if loops can write to them, else a float32 copy, which is copied back at the end.
    """
    if states.dtype == torch.float32 and states.device.type == "cpu" and states.stride(-1) == 1:
        yield states
        return
    rows = torch.empty(states.shape)
    yield rows
    if states.dtype == torch.float16:
        # What was near its greatest number must not come back infinite.
        largest = torch.finfo(torch.float16).max
        rows.clamp_(-largest, largest)
    states.copy_(rows)
