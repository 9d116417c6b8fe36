"""One decode step of the running batch through the model: op by op on a CPU, as a replayed CUDA graph on a GPU."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrumkv.common.model.load import LoadedModel
from spectrumkv.decode_server.attention import ATTENTION_NAME, DecodeMetadata, HostDecodeMetadata
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.request import DecodeAnswer


@dataclass(frozen=True)
class DecodeRow:
    """One token that the model computes in a step.

    Attributes:
        answer: whose token it is.
        token: its id.
        position: its place among prompt and completion.
    """

    answer: DecodeAnswer
    token: int
    position: int


class ModelRunner(ABC):
    """Runs decode steps, and counts the prompt tokens among what it computes.

    Decode has the KV of every prompt token from prefill; whatever computes one again wastes the transfer.
    """

    def logits(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """Run one step.

        Args:
            rows: one or more, at most one for each answer.

        Returns:
            The model's output for each row, float32 `[rows, vocab]` on the CPU.
        """
        for row in rows:
            row.answer.recomputed_prompt_tokens += row.position < row.answer.prompt_tokens
        return self._forward(rows)

    @abstractmethod
    def _forward(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """Compute what `logits` returns."""


def model_runner(loaded: LoadedModel, pool: KvPool, max_rows: int) -> ModelRunner:
    """Return what runs this model's steps.

    Args:
        loaded: the model; its attention is switched to the slots.
        pool: the slots.
        max_rows: most rows of a step.
    """
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    if loaded.device.type == "cuda":
        return CudaGraphRunner(loaded.model, pool, max_rows)
    return EagerRunner(loaded.model)


class EagerRunner(ModelRunner):
    """Calls the model for each step.

    Args:
        model: on the CPU.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def _forward(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        positions = [row.position for row in rows]
        logits = self._model(
            input_ids=torch.tensor([[row.token] for row in rows]),
            position_ids=torch.tensor(positions)[:, None],
            use_cache=False,
            metadata=HostDecodeMetadata.of([row.answer.allocation for row in rows], positions),
        ).logits
        last: torch.Tensor = logits[:, -1].float()
        return last


class CudaGraphRunner(ModelRunner):
    """Replays CUDA graphs: a step's kernels take less time than launching them one by one.

    There is a graph for each power of two of rows. Padding rows use a spare slot.

    Args:
        model: on a GPU.
        pool: the slots.
        max_rows: most rows of a step.
    """

    def __init__(self, model: PreTrainedModel, pool: KvPool, max_rows: int) -> None:
        self._pool = pool
        sizes = [1]
        while sizes[-1] < max_rows:
            sizes.append(2 * sizes[-1])
        # Tokens, positions, first slots, newest slots.
        self._padding = torch.tensor([[0], [0], [pool.spare_slot], [pool.spare_slot]])
        self._inputs = self._padding.repeat(1, sizes[-1]).to(pool.keys.device)
        self._staged = self._padding.repeat(1, sizes[-1]).pin_memory()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, torch.Tensor] = {}
        graph_memory = torch.cuda.graph_pool_handle()
        # The largest graph comes first: the others reuse its memory.
        for size in reversed(sizes):
            self._capture(model, size, graph_memory)

    def _forward(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        size = next(size for size in sorted(self._graphs) if size >= len(rows))
        self._staged.copy_(self._padding)
        starts = [row.answer.allocation.start for row in rows]
        taken = [
            (row.token, row.position, start, start + row.position) for row, start in zip(rows, starts, strict=True)
        ]
        self._staged[:, : len(rows)] = torch.tensor(taken).T
        self._inputs.copy_(self._staged, non_blocking=True)
        self._graphs[size].replay()
        return self._logits[size][: len(rows)].cpu()

    @torch.inference_mode()
    def _capture(self, model: PreTrainedModel, size: int, graph_memory: Any) -> None:
        def step() -> torch.Tensor:
            tokens, positions, firsts, newest = self._inputs[:, :size]
            logits = model(
                input_ids=tokens[:, None],
                position_ids=positions[:, None],
                use_cache=False,
                metadata=DecodeMetadata(self._pool, firsts, newest),
            ).logits
            last: torch.Tensor = logits[:, -1].float()
            return last

        # Kernels must be compiled and libraries loaded before anything is captured.
        stream = torch.cuda.Stream(self._inputs.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._inputs.device))
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=graph_memory, stream=stream, capture_error_mode="thread_local"):
            self._logits[size] = step()
        self._graphs[size] = graph
