"""The last queries of a prompt, however its prefill was cut."""

import pytest
import torch

from spectrumkv.vllm_plugin.prefill.query_window import QueryWindow

PROMPT, WINDOW = 100, 10


def rows(first: int, count: int) -> torch.Tensor:
    """Queries whose elements are their positions."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None, None].expand(count, 2, 4)


def taken(chunks: list[tuple[int, int]]) -> list[float]:
    window = QueryWindow(PROMPT, WINDOW)
    for first, count in chunks:
        if window.wants(first, count):
            window.add(0, first, rows(first, count))
    queries = window.take(0)
    assert queries.shape[0] == 2
    return [float(one) for one in queries[0, :, 0]]


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 100)],
        [(0, 64), (64, 36)],
        [(0, 95), (95, 5)],
        [(0, 92), (92, 3), (95, 5)],
        # The prompt lost its pages after 97 tokens and began again.
        [(0, 95), (95, 2), (0, 50), (50, 50)],
        [(0, 97), (0, 93), (93, 7)],
    ],
)
def test_the_last_queries_are_kept_across_chunks(chunks: list[tuple[int, int]]) -> None:
    assert taken(chunks) == [float(one) for one in range(90, 100)]


@pytest.mark.parametrize(("hit", "left"), [(96, 4), (99, 1)])
def test_after_a_prefix_hit_there_are_fewer(hit: int, left: int) -> None:
    assert taken([(hit, left)]) == [float(one) for one in range(hit, PROMPT)]


def test_the_engine_may_use_its_buffer_anew() -> None:
    window, buffer = QueryWindow(PROMPT, WINDOW), rows(0, PROMPT).clone()
    window.add(0, 0, buffer)
    buffer.zero_()
    assert float(window.take(0).min()) == 90
