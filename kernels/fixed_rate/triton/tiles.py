"""What a program transforms at a time, in both directions: what shared memory has room for, also on small GPUs."""

import triton

# Tokens that a program transforms, and columns of the product that it has at a time. Heads wider than so many
# elements leave room for half as many.
TILE_TOKENS, TILE_COLUMNS = 32, 32
WIDE_HEAD = 128
# Groups of rows at a time.
BLOCK_GROUPS = 16
# Triton multiplies matrices of no fewer rows and columns than this.
LEAST_DIM = 16


def tile_of(head_dim: int) -> tuple[int, int]:
    """Return the tokens that a program transforms, and the columns that it has at a time.

    Args:
        head_dim: elements of a head.
    """
    shares = 2 if head_dim > WIDE_HEAD else 1
    columns = min(TILE_COLUMNS, max(LEAST_DIM, triton.next_power_of_2(head_dim)))
    return TILE_TOKENS // shares, columns // shares


def padded_half(head_dim: int) -> int:
    """Return the columns of a tile that hold half of a head's elements, as many as Triton can multiply.

    Args:
        head_dim: elements of a head.
    """
    return max(LEAST_DIM, int(triton.next_power_of_2(head_dim // 2)))
