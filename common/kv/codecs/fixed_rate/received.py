"""Bodies that arrived: taken apart, checked, and written into slots; the layout is documented in kv.proto."""

from dataclasses import dataclass

import numpy as np
import torch

from spectrumkv.common.errors import DataLossError
from spectrumkv.common.kv.codecs.body import BodyReader
from spectrumkv.common.kv.codecs.calibrated.sinks import write_sinks
from spectrumkv.common.kv.codecs.fixed_rate.segment_codec import (
    CALIBRATED,
    ESCAPE_BYTES,
    HEADER,
    LARGEST_ESCAPE,
    OWN,
    WORD_BYTES,
    padded,
)
from spectrumkv.common.kv.codecs.fixed_rate.statistics import calibrated_scales
from spectrumkv.common.kv.codecs.fixed_rate.transform import LayerTransform
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.kernels.fixed_rate.dispatch import synthesise
from spectrumkv.kernels.fixed_rate.layout import LARGEST_EXPONENT, RecordLayout, RowScales
from spectrumkv.kernels.fixed_rate.operands import Records


@dataclass(frozen=True, eq=False)
class CodedTokens:
    """The tokens of a body that are no sinks.

    Attributes:
        scales: of the rows.
        tokens: uint8 `[n]`, class and gain of each.
        layout: of the records.
        records: views of the body.
        base: of the tokens before `turn`.
        turn: index of one of them, or more.
        words_at: byte of the body at which the records begin.
    """

    scales: RowScales
    tokens: torch.Tensor
    layout: RecordLayout
    records: Records
    base: int
    turn: int
    words_at: int


@dataclass(frozen=True, eq=False)
class ReceivedBody:
    """A body that was checked.

    Attributes:
        body: uint8 `[b]` as it arrived.
        sinks: how many of its first tokens are sent without the transform.
        coded: the others; None where there are none.
    """

    body: torch.Tensor
    sinks: int
    coded: CodedTokens | None

    @property
    def layout(self) -> RecordLayout | None:
        """Return the layout of the records, None where there are none."""
        return None if self.coded is None else self.coded.layout


def read_body(transform: LayerTransform, body: torch.Tensor, tokens: int, geometry: KvGeometry) -> ReceivedBody:
    """Take a body apart and check it.

    Args:
        transform: of the layer.
        body: uint8 `[b]` on the CPU, as it arrived.
        tokens: of the segment.
        geometry: shape and dtype of the model's cache.

    Returns:
        The body.

    Raises:
        DataLossError: it does not hold what its header says.
    """
    reader = BodyReader(body.numpy().data)
    base, top, sinks, kind, turn, escapes = reader.header(HEADER)
    if sinks > tokens or kind not in (CALIBRATED, OWN):
        raise DataLossError(f"a segment of {tokens} tokens has {sinks} sinks and scales of kind {kind}", "malformed")
    reader.take(geometry.fp16_bytes_per_layer(sinks))
    if sinks == tokens:
        reader.finish()
        return ReceivedBody(body, sinks, None)
    scales = _scales(reader, transform, top, own=kind == OWN)
    of_tokens = torch.from_numpy(reader.array(tokens - sinks, np.uint8))
    reader.take(padded(tokens - sinks) - (tokens - sinks))
    layout = RecordLayout.of(scales, of_tokens.numpy(), base, turn)
    words_at = reader.position
    records = Records(
        torch.from_numpy(reader.array(WORD_BYTES * layout.words, np.uint8)),
        torch.from_numpy(reader.array(WORD_BYTES * escapes, np.uint8)),
        torch.from_numpy(reader.array(escapes, np.float32).copy()),
    )
    reader.finish()
    _check_escapes(records, (tokens - sinks) * transform.rows)
    return ReceivedBody(body, sinks, CodedTokens(scales, of_tokens, layout, records, base, turn, words_at))


def write_body(
    transform: LayerTransform,
    received: ReceivedBody,
    first: int,
    geometry: KvGeometry,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write the tokens of a body on a CPU: the inverse of `encode_segment`.

    Args:
        transform: of the layer.
        received: the body, as `read_body` gave it.
        first: position of the first token.
        geometry: shape and dtype of the model's cache.
        keys: `[kv_heads, n, head_dim]` in the model's own dtype, any strides; written.
        values: like `keys`.
    """
    sinks, coded = received.sinks, received.coded
    if sinks:
        exact = received.body[HEADER.size :][: geometry.fp16_bytes_per_layer(sinks)].numpy()
        write_sinks(exact, geometry, keys[:, :sinks], values[:, :sinks])
    if coded is None:
        return
    synthesis = transform.synthesis(first + sinks, len(coded.tokens))
    synthesise(coded.records, coded.scales, coded.tokens, coded.layout, synthesis, keys[:, sinks:], values[:, sinks:])


def token_bytes(received: ReceivedBody, rows: int) -> np.ndarray:
    """Divide a body's bytes among its tokens.

    A sink has its own bytes; any other token has its record, its class and gain, and its escapes. Header, scales and
    padding serve all tokens that are no sinks, and are divided evenly among them.

    Args:
        received: the body.
        rows: coefficients of a token.

    Returns:
        float64 `[n]`, the body's bytes together.
    """
    sinks, coded = np.full(received.sinks, 2.0 * rows), received.coded
    shared = received.body.numel() - sinks.sum()
    if coded is None:
        return np.full(received.sinks, received.body.numel() / received.sinks)
    escaped = coded.records.escape_index.numpy().view("<u4") // rows
    escapes = np.bincount(escaped, minlength=len(coded.tokens))
    own = 1.0 + WORD_BYTES * coded.layout.words_of_profile[coded.layout.profiles] + ESCAPE_BYTES * escapes
    others: np.ndarray = own + (shared - own.sum()) / len(own)
    return np.concatenate((sinks, others))


def _scales(reader: BodyReader, transform: LayerTransform, top: int, own: bool) -> RowScales:
    """Return the rows' scales: sent, or the calibrated ones, moved.

    Raises:
        DataLossError: standard deviations are beyond what bodies may have.
    """
    if own:
        drops, means = reader.array(transform.rows, np.uint8), reader.array(transform.rows, np.int8)
        scales = RowScales(top, drops, means)
    else:
        scales = calibrated_scales(transform.std, top)
    if abs(scales.top) > LARGEST_EXPONENT:
        raise DataLossError(f"a segment's largest standard deviation has the exponent {scales.top} / 8", "scale")
    return scales


def _check_escapes(records: Records, symbols: int) -> None:
    """Refuse escapes that do not rise, lie outside the segment, or are no sensible numbers.

    Raises:
        DataLossError: some do.
    """
    index = np.frombuffer(records.escape_index.numpy().tobytes(), "<u4").astype(np.int64)
    if len(index) and (index[-1] >= symbols or bool((np.diff(index) <= 0).any())):
        raise DataLossError(f"the indices of {len(index)} escapes do not rise within {symbols} symbols", "malformed")
    if not bool((records.escape_value.abs() < LARGEST_ESCAPE).all()):
        raise DataLossError("a coefficient that was sent as it is has no finite value", "scale")
