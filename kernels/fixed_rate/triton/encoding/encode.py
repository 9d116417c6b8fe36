"""A layer on a GPU to the bodies of its segments: three launches, and a copy that the caller waits for."""

import torch
import triton

from spectrumkv.kernels.fixed_rate.triton.encoding.analysis import analyse_kernel
from spectrumkv.kernels.fixed_rate.triton.encoding.memory import CodedLayer, LayerRate, Workspace
from spectrumkv.kernels.fixed_rate.triton.encoding.packing import pack_kernel
from spectrumkv.kernels.fixed_rate.triton.encoding.planning import WORDS_SHIFT
from spectrumkv.kernels.fixed_rate.triton.encoding.segments import SegmentShape
from spectrumkv.kernels.fixed_rate.triton.encoding.statistics import statistics_kernel
from spectrumkv.kernels.fixed_rate.triton.tables import AnalysisTables, quantizer_tables
from spectrumkv.kernels.fixed_rate.triton.tiles import BLOCK_GROUPS, padded_half, tile_of
from spectrumkv.kernels.upload import upload

# Rows that a program measures, and tokens at a time.
STATISTICS_ROWS, STATISTICS_TOKENS = 32, 64
# Tokens of a layer at a time.
LAYER_TOKENS = 1024
# Words of bits, one for each escape, that are looked at together.
ESCAPE_WORDS = 1024
# Words of a budget beyond which all budgets are alike.
MOST_WORDS = (1 << 60) - 1


def encode(
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    tables: AnalysisTables,
    gain_scale: torch.Tensor,
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
        gain_scale: float32 `[2 · kv_heads · head_dim]`, what coefficients are multiplied with in the sum of squares
            that tells a token's gain.
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
    halves = layer.bodies.view(half_dtype)
    with torch.cuda.device(keys.get_device()):
        _analyse(keys, values, angles, tables, gain_scale, shape, work, halves)
        _measure(scores, tables, rate, layer, work, halves)
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
            table.level,
            table.limit,
            table.thresholds,
            table.powers,
            *shape.scalars,
            rows=rows,
            groups=groups,
            padded_words=padded_words,
            block_groups=BLOCK_GROUPS,
            block_tokens=max(1, ESCAPE_WORDS // padded_words),
            # Sums of squares are rounded as on the host.
            enable_fp_fusion=False,
        )


def _analyse(
    keys: torch.Tensor,
    values: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    tables: AnalysisTables,
    gain_scale: torch.Tensor,
    shape: SegmentShape,
    work: Workspace,
    halves: torch.Tensor,
) -> None:
    """Make coefficients of the tokens, and write the sinks: the first launch."""
    kv_heads, _, head_dim = keys.shape
    tile_tokens, tile_columns = tile_of(head_dim)
    analyse_kernel[triton.cdiv(shape.tokens, tile_tokens), 2 * kv_heads](
        keys,
        values,
        *keys.stride(),
        *values.stride(),
        *angles,
        tables.mean,
        tables.analysis,
        gain_scale,
        work.coefficients,
        work.energies,
        halves,
        work.counters,
        *shape.scalars,
        work.counters.numel(),
        1 / tables.scaling,
        kv_heads=kv_heads,
        half=head_dim // 2,
        padded_half=padded_half(head_dim),
        block_tokens=tile_tokens,
        block_columns=tile_columns,
    )


def _measure(
    scores: torch.Tensor,
    tables: AnalysisTables,
    rate: LayerRate,
    layer: CodedLayer,
    work: Workspace,
    halves: torch.Tensor,
) -> None:
    """Find what coefficients are like and what the layer's steps are: the second launch."""
    shape, table, words = layer.shape, quantizer_tables(scores.device), min(max(rate.words, 0), MOST_WORDS)
    rows, groups = work.coefficients.shape[1], work.groups.shape[1]
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
        heads=work.energies.shape[0],
        rows=rows,
        groups=groups,
        block_rows=STATISTICS_ROWS,
        block_tokens=STATISTICS_TOKENS,
        block_groups=BLOCK_GROUPS,
        block_layer=LAYER_TOKENS,
    )
