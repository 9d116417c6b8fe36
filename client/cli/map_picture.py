"""Draw at what precision a prompt's KV was sent, tokens by layers, as a PNG file."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from spectrumkv.client.completion import Completion, PromptToken
from spectrumkv.client.kv_map import LEVELS, KvMap
from spectrumkv.common.errors import FailedPreconditionError, InternalError, InvalidArgumentError

# Prompts of so many tokens at most have their texts below the picture; longer ones have numbers.
MOST_LABELS = 80
DOTS_PER_INCH = 120
# Bits at which the highest level ends; a model that computes in 32 bits may send these.
MOST_BITS = 64.0


def figure_class() -> Any:
    """Return matplotlib's `Figure`, which needs no display.

    Raises:
        FailedPreconditionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FailedPreconditionError(
            "--map FILE.png draws with matplotlib, which is not installed; pip install 'spectrumkv[bench]', or leave "
            "FILE.png out"
        ) from error
    return Figure


def draw_map(completion: Completion, file: Path) -> None:
    """Write a picture of a completion's map, one column for each token and one row for each layer.

    Args:
        completion: with the prompt's tokens and a map layer by layer.
        file: the PNG file.

    Raises:
        FailedPreconditionError: matplotlib is not installed.
        InternalError: the completion has no map of layers.
        InvalidArgumentError: the file cannot be written.
    """
    kv_map = completion.kv_map
    if kv_map is None or not kv_map.layers:
        raise InternalError("the server sent no map layer by layer")
    figure = figure_class()(figsize=_size(kv_map), layout="constrained")
    axes = figure.add_subplot()
    _draw_levels(figure, axes, kv_map)
    _label_tokens(axes, completion.prompt_tokens)
    mean, usage = sum(kv_map.bits) / len(kv_map.bits), completion.usage
    axes.set_title(
        f"{len(kv_map.bits):,} tokens, policy {usage.policy}, codec {usage.codec}: {mean:.2f} bits per element, "
        f"{usage.budget_counted:.3f} of FP16 on the wire",
        fontsize="medium",
    )
    try:
        figure.savefig(file, dpi=DOTS_PER_INCH, format="png")
    except OSError as error:
        raise InvalidArgumentError(f"--map {file}: {error.strerror}; name a file that can be written") from error


def _size(kv_map: KvMap) -> tuple[float, float]:
    """Return width and height in inches: cells a quarter of an inch wide, as long as that fits a page."""
    return min(16.0, max(8.0, 3 + 0.25 * len(kv_map.bits))), min(9.0, max(4.0, 2 + 0.14 * len(kv_map.layers)))


def _draw_levels(figure: Any, axes: Any, kv_map: KvMap) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap([level.colour for level in LEVELS])
    edges = [*(level.least for level in LEVELS), MOST_BITS]
    norm = BoundaryNorm(edges, len(LEVELS))
    image = axes.imshow(kv_map.layers, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, spacing="uniform", label="bits per element")
    bar.set_ticks([(low + high) / 2 for low, high in pairwise(edges)])
    bar.set_ticklabels([level.name for level in LEVELS])
    bar.ax.minorticks_off()


def _label_tokens(axes: Any, tokens: Sequence[PromptToken]) -> None:
    if len(tokens) > MOST_LABELS:
        axes.set_xlabel("token of the prompt")
        return
    axes.set_xticks(range(len(tokens)))
    # Fonts lack some characters, and "$" begins a formula.
    texts = [token.text.encode("unicode_escape").decode() for token in tokens]
    axes.set_xticklabels(texts, rotation=90, fontsize="small", parse_math=False)
