"""The flags that give the shape of a synthetic KV cache; the default is that of the embedded model."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectrumkv.common.kv.geometry import KvGeometry


def add_geometry_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--tokens`, `--layers` and what else a cache's shape has."""
    group = parser.add_argument_group("the cache's shape (default: the embedded model's)")
    for name, default, what in (
        ("tokens", 2048, "tokens of the prompt"),
        ("layers", 30, "layers"),
        ("kv-heads", 3, "KV heads of a layer"),
        ("head-dim", 64, "elements of a key in a head"),
    ):
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype that the model computes in (default: %(default)s)",
    )


def geometry_from(arguments: argparse.Namespace) -> "KvGeometry":
    """Read the flags of `add_geometry_flags`, `--tokens` apart.

    Raises:
        InvalidArgumentError: a number is not allowed.
    """
    import torch

    from spectrumkv.common.kv.geometry import KvGeometry

    dtype: torch.dtype = getattr(torch, arguments.dtype)
    return KvGeometry(arguments.layers, arguments.kv_heads, arguments.head_dim, dtype)
