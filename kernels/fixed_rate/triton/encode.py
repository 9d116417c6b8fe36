"""A layer on a GPU to the bodies of its segments: three launches, and a copy that the caller waits for."""

from dataclasses import dataclass

import torch
import triton

from spectrumkv.kernels.fixed_rate.layout import GROUP_ROWS
from spectrumkv.kernels.fixed_rate.triton.analysis import _analyse_kernel
from spectrumkv.kernels.fixed_rate.triton.blocks import (
    BLOCK_COLUMNS,
    FOUND_BASE,
    FOUND_BLOCKS,
    FOUND_BROKEN,
    FOUND_DRIFT,
    BlockShape,
)
from spectrumkv.kernels.fixed_rate.triton.integers import PADDED_PROFILES
from spectrumkv.kernels.fixed_rate.triton.packing import _pack_kernel
from spectrumkv.kernels.fixed_rate.triton.statistics import _statistics_kernel
from spectrumkv.kernels.fixed_rate.triton.tables import AnalysisTables, quantizer_tables
from spectrumkv.kernels.upload import aligned, upload

# Tokens that a program transforms, and columns of the product that it has at a time: what shared memory has room for.
ANALYSIS_TOKENS, ANALYSIS_COLUMNS = 32, 64
# Rows that a program measures, and tokens at a time.
STATISTICS_ROWS, STATISTICS_TOKENS = 32, 64
# Groups of rows at a time, and tokens of a layer at a time.
BLOCK_GROUPS, LAYER_TOKENS = 16, 1024
# Words of bits, one for each escape, that are looked at together.
ESCAPE_WORDS = 1024
# Triton multiplies matrices of no fewer rows and columns than this.
LEAST_DIM = 16
# Words of a budget beyond which all budgets are alike, and how they are told to kernels.
MOST_WORDS, WORDS_SHIFT = (1 << 60) - 1, 30


@dataclass(frozen=True)
class LayerRate:
    """What a layer may take.

    Attributes:
        words: of the records of this layer and, as foreseen, of all later ones.
        drift: by how much spreads lie above the calibrated ones, in units of a ratio, before this layer.
        drift_weight: with which what this layer shows of that counts.
    """

    words: int
    drift: float
    drift_weight: float


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """A layer's bodies and what was found out about it, in one piece of memory, so that one copy brings it to the host.

    Attributes:
        shape: of its blocks.
        memory: uint8, on the GPU or on the host.
    """

    shape: BlockShape
    memory: torch.Tensor

    @classmethod
    def on_device(cls, shape: BlockShape, device: torch.device) -> "CodedLayer":
        """Obtain the memory of a layer.

        Args:
            shape: of its blocks.
            device: where.

        Returns:
            The layer; its memory holds nothing yet.
        """
        size = _found_bytes(shape.blocks) + shape.blocks * shape.body_bytes
        return cls(shape, torch.empty(size, dtype=torch.uint8, device=device))

    def copied(self, memory: torch.Tensor) -> "CodedLayer":
        """Return the layer in other memory, into which its own was copied: uint8 `[bytes]` on the host."""
        return CodedLayer(self.shape, memory)

    @property
    def found(self) -> torch.Tensor:
        """Show what was found out: int64 `[FOUND_BLOCKS + blocks · BLOCK_COLUMNS]`; see `blocks`."""
        return self.memory[: 8 * (FOUND_BLOCKS + self.shape.blocks * BLOCK_COLUMNS)].view(torch.int64)

    @property
    def bodies(self) -> torch.Tensor:
        """Show the bodies without their headers, at multiples of `shape.body_bytes`: uint8."""
        return self.memory[_found_bytes(self.shape.blocks) :]

    @property
    def broken_scores(self) -> int:
        """Return how many scores are infinite or NaN; on the host, like the others."""
        return int(self.found[FOUND_BROKEN])

    @property
    def base(self) -> int:
        """Return the base that was found."""
        return int(self.found[FOUND_BASE])

    @property
    def drift(self) -> float:
        """Return by how much spreads lie above the calibrated ones, this layer's included."""
        return float(self.found[FOUND_DRIFT : FOUND_DRIFT + 1].view(torch.float64))

    @property
    def blocks(self) -> list[list[int]]:
        """Return for each block the numbers that `blocks` names: words, escapes, top, and what is not finite."""
        found: list[list[int]] = self.found[FOUND_BLOCKS:].view(-1, BLOCK_COLUMNS).tolist()
        return found


@dataclass(frozen=True, eq=False)
class Workspace:
    """What kernels leave each other on the GPU, of a layer of n tokens in B blocks.

    Attributes:
        coefficients: float32 `[n, R]`.
        energies: float32 `[2H, n]`, of each token's scaled coefficients in each head.
        gains: int32 `[n]`.
        starts: int32 `[n]`, words before each token's record in its block.
        escapes: int32 `[n, G]`, a bit for each row.
        exponents: int32 `[B, R]`, of the rows' spreads.
        row_means: float32 `[B, R]`, of the coefficients.
        drops: int32 `[B, R]`.
        order: int32 `[B, R]`, rows by falling spread.
        places: int32 `[B, R]`, each row's place in that order.
        means: float32 `[B, R]`, as they are sent.
        inverse: float32 `[B, R]`, 1 ÷ the spreads as they are sent.
        groups: int32 `[B, G]`, exponents.
        histograms: int32 `[B, PADDED_PROFILES]`.
        steps: int32 `[2]`, base, and the token from which on it is one more.
        counters: int32 `[2B + 1]`, programs that are done.
    """

    coefficients: torch.Tensor
    energies: torch.Tensor
    gains: torch.Tensor
    starts: torch.Tensor
    escapes: torch.Tensor
    exponents: torch.Tensor
    row_means: torch.Tensor
    drops: torch.Tensor
    order: torch.Tensor
    places: torch.Tensor
    means: torch.Tensor
    inverse: torch.Tensor
    groups: torch.Tensor
    histograms: torch.Tensor
    steps: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def on_device(cls, shape: BlockShape, heads: int, rows: int, device: torch.device) -> "Workspace":
        """Obtain the memory.

        Args:
            shape: of the layer's blocks.
            heads: of both sides.
            rows: coefficients of a token.
            device: where.

        Returns:
            The memory, which holds nothing yet.
        """
        tokens, number, groups = shape.tokens, shape.blocks, -(-rows // GROUP_ROWS)

        def floats(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        def integers(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        return cls(
            floats(tokens, rows), floats(heads, tokens), integers(tokens), integers(tokens), integers(tokens, groups),
            integers(number, rows), floats(number, rows), integers(number, rows), integers(number, rows),
            integers(number, rows), floats(number, rows), floats(number, rows), integers(number, groups),
            integers(number, PADDED_PROFILES.value), integers(2), integers(2 * number + 1),
        )  # fmt: skip


def _found_bytes(blocks: int) -> int:
    return aligned(8 * (FOUND_BLOCKS + blocks * BLOCK_COLUMNS))


def encode(
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    tables: AnalysisTables,
    shape: BlockShape,
    rate: LayerRate,
) -> tuple[CodedLayer, Workspace]:
    """Code a layer as finely as it may be. CPU tensors work under `TRITON_INTERPRET=1` only.

    Args:
        keys: float32, float16 or bfloat16 `[kv_heads, n, head_dim]`, any strides, after the rotary embedding.
        values: like `keys`.
        scores: float32 `[n]`, each token's share of the attention.
        angles: cosine and sine, float32 `[n or more, head_dim / 2]`, of each token's angles.
        tables: of the layer.
        shape: of its blocks.
        rate: what it may take.

    Returns:
        The layer on the device, without headers, and what `pack` needs to code it again.
    """
    kv_heads, _, head_dim = keys.shape
    heads, rows, device = 2 * kv_heads, 2 * kv_heads * head_dim, keys.device
    layer, work = CodedLayer.on_device(shape, device), Workspace.on_device(shape, heads, rows, device)
    half_dtype = torch.float16 if keys.dtype == torch.float32 else keys.dtype
    halves, table = layer.bodies.view(half_dtype), quantizer_tables(device)
    words = min(max(rate.words, 0), MOST_WORDS)
    with torch.cuda.device(keys.get_device()):
        _analyse_kernel[triton.cdiv(shape.tokens, ANALYSIS_TOKENS), heads](
            keys,
            values,
            *keys.stride(),
            *values.stride(),
            *angles,
            tables.mean,
            tables.analysis,
            tables.inverse_std,
            work.coefficients,
            work.energies,
            halves,
            work.counters,
            *shape.scalars,
            work.counters.numel(),
            1 / tables.scaling,
            kv_heads=kv_heads,
            half=head_dim // 2,
            padded_half=max(LEAST_DIM, triton.next_power_of_2(head_dim // 2)),
            block_tokens=ANALYSIS_TOKENS,
            block_columns=min(ANALYSIS_COLUMNS, max(LEAST_DIM, triton.next_power_of_2(head_dim))),
        )
        _statistics_kernel[triton.cdiv(rows, STATISTICS_ROWS), shape.blocks](
            work.coefficients,
            work.energies,
            scores,
            layer.bodies,
            halves,
            layer.found,
            work.gains,
            work.exponents,
            work.row_means,
            work.drops,
            work.order,
            work.places,
            work.groups,
            work.means,
            work.inverse,
            work.histograms,
            work.steps,
            work.starts,
            work.counters,
            tables.exponents,
            tables.group_exponents,
            tables.later,
            table.thresholds,
            table.borders,
            table.powers,
            *shape.scalars,
            tables.quarters,
            tables.lowest_quarter,
            words >> WORDS_SHIFT,
            words & ((1 << WORDS_SHIFT) - 1),
            tables.step_exponent,
            rate.drift,
            rate.drift_weight,
            heads=heads,
            rows=rows,
            groups=work.groups.shape[1],
            block_rows=STATISTICS_ROWS,
            block_tokens=STATISTICS_TOKENS,
            block_groups=BLOCK_GROUPS,
            block_layer=LAYER_TOKENS,
        )
    _pack(layer, work, work.steps, work.starts)
    return layer, work


def pack_again(layer: CodedLayer, work: Workspace, base: int, turn: int, starts: torch.Tensor) -> None:
    """Write the records of a layer once more, at other steps, by a copy to the GPU and a launch.

    Args:
        layer: that was coded; its records and escapes are overwritten, and its found words are not.
        work: as `encode` left it.
        base: of the tokens before `turn`.
        turn: the position from which on tokens have a base that is greater by 1.
        starts: int32 `[n]` on the CPU, words before each token's record in its block.
    """
    steps, there = upload((torch.tensor([base, turn], dtype=torch.int32), starts), layer.memory.device)
    _pack(layer, work, steps, there)


def _pack(layer: CodedLayer, work: Workspace, steps: torch.Tensor, starts: torch.Tensor) -> None:
    shape, table = layer.shape, quantizer_tables(layer.memory.device)
    rows, groups = work.coefficients.shape[1], work.groups.shape[1]
    padded_words = triton.next_power_of_2(groups)
    with torch.cuda.device(layer.memory.get_device()):
        _pack_kernel[(shape.tokens,)](
            work.coefficients,
            layer.bodies,
            layer.bodies.view(torch.int32),
            layer.found,
            work.order,
            work.places,
            work.groups,
            work.means,
            work.inverse,
            steps,
            starts,
            work.escapes,
            work.counters,
            table.offset,
            table.slope,
            table.limit,
            table.thresholds,
            table.powers,
            *shape.scalars,
            rows=rows,
            groups=groups,
            padded_words=padded_words,
            block_groups=BLOCK_GROUPS,
            block_tokens=max(1, ESCAPE_WORDS // padded_words),
        )
