"""A layer on a GPU to the bodies of its segments: three launches, and a copy that the caller waits for."""

import torch
import triton

from spectrumkv.kernels.fixed_rate.triton.analysis import analyse_kernel
from spectrumkv.kernels.fixed_rate.triton.memory import CodedLayer, LayerRate, Workspace
from spectrumkv.kernels.fixed_rate.triton.packing import pack_kernel
from spectrumkv.kernels.fixed_rate.triton.planning import WORDS_SHIFT
from spectrumkv.kernels.fixed_rate.triton.segments import SegmentShape
from spectrumkv.kernels.fixed_rate.triton.statistics import statistics_kernel
from spectrumkv.kernels.fixed_rate.triton.tables import AnalysisTables, quantizer_tables
from spectrumkv.kernels.upload import upload

# Tokens that a program transforms, and columns of the product that it has at a time: what shared memory has room for,
# also on small GPUs. Heads wider than so many elements leave room for half as many.
TILE_TOKENS, TILE_COLUMNS = 32, 32
WIDE_HEAD = 128
# Rows that a program measures, and tokens at a time.
STATISTICS_ROWS, STATISTICS_TOKENS = 32, 64
# Groups of rows at a time, and tokens of a layer at a time.
BLOCK_GROUPS, LAYER_TOKENS = 16, 1024
# Words of bits, one for each escape, that are looked at together.
ESCAPE_WORDS = 1024
# Triton multiplies matrices of no fewer rows and columns than this.
LEAST_DIM = 16
# Words of a budget beyond which all budgets are alike.
MOST_WORDS = (1 << 60) - 1


def tile_of(head_dim: int) -> tuple[int, int]:
    """Return the tokens that a program transforms, and the columns that it has at a time.

    Args:
        head_dim: elements of a head.
    """
    shares = 2 if head_dim > WIDE_HEAD else 1
    columns = min(TILE_COLUMNS, max(LEAST_DIM, triton.next_power_of_2(head_dim)))
    return TILE_TOKENS // shares, columns // shares


def encode(
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    tables: AnalysisTables,
    shape: SegmentShape,
    rate: LayerRate,
) -> tuple[CodedLayer, Workspace]:
    """Code a layer as finely as it may be. CPU tensors work under `TRITON_INTERPRET=1` only.

    Args:
        keys: float32, float16 or bfloat16 `[kv_heads, n, head_dim]`, any strides, after the rotary embedding.
        values: like `keys`.
        scores: float32 `[n]`, each token's share of the attention.
        angles: cosine and sine, float32 `[n or more, head_dim / 2]`, of each token's angles.
        tables: of the layer.
        shape: of its segments.
        rate: what it may take.

    Returns:
        The layer on the device, without headers, and what `pack_again` needs to code it again.

    Raises:
        ValueError: there is not even room for what comes before the records.
    """
    kv_heads, _, head_dim = keys.shape
    heads, rows, device = 2 * kv_heads, 2 * kv_heads * head_dim, keys.device
    if shape.fixed_bytes(rows) > shape.body_bytes:
        raise ValueError(f"{shape} has no room for {shape.fixed_bytes(rows)} bytes before the records")
    layer, work = CodedLayer.on_device(shape, device), Workspace.on_device(shape, heads, rows, device)
    half_dtype = torch.float16 if keys.dtype == torch.float32 else keys.dtype
    halves, table = layer.bodies.view(half_dtype), quantizer_tables(device)
    words = min(max(rate.words, 0), MOST_WORDS)
    tile_tokens, tile_columns = tile_of(head_dim)
    with torch.cuda.device(keys.get_device()):
        analyse_kernel[triton.cdiv(shape.tokens, tile_tokens), heads](
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
            block_tokens=tile_tokens,
            block_columns=tile_columns,
        )
        statistics_kernel[triton.cdiv(rows, STATISTICS_ROWS), shape.segments](
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
            work.ranks,
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
            words >> WORDS_SHIFT.value,
            words & ((1 << WORDS_SHIFT.value) - 1),
            tables.step_exponent,
            rate.drift,
            rate.drift_weight,
            rate.smooth_base,
            rate.base_weight,
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
        starts: int32 `[n]` on the CPU, words before each token's record in its segment.
    """
    steps, there = upload((torch.tensor([base, turn], dtype=torch.int32), starts), layer.memory.device)
    _pack(layer, work, steps, there)


def _pack(layer: CodedLayer, work: Workspace, steps: torch.Tensor, starts: torch.Tensor) -> None:
    shape, table = layer.shape, quantizer_tables(layer.memory.device)
    rows, groups = work.coefficients.shape[1], work.groups.shape[1]
    padded_words = triton.next_power_of_2(groups)
    with torch.cuda.device(layer.memory.get_device()):
        pack_kernel[(shape.tokens,)](
            work.coefficients,
            layer.bodies,
            layer.bodies.view(torch.int32),
            layer.found,
            work.order,
            work.ranks,
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
