"""One decode step of the running batch through the model: op by op on a CPU, as a replayed CUDA graph on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from spectrumkv.common.model.load import LoadedModel
from spectrumkv.decode_server.attention import ATTENTION_NAME, DecodeMetadata, HostDecodeMetadata
from spectrumkv.decode_server.kv_pool import Allocation, KvPool


@dataclass(frozen=True)
class DecodeRow:
    """What one request puts into a step.

    Attributes:
        token: what the model reads.
        position: its place among prompt and completion.
        allocation: the request's slots.
    """

    token: int
    position: int
    allocation: Allocation


class ModelRunner(Protocol):
    """Runs decode steps."""

    def logits(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """Run a step; return what follows each row: float32 `[rows, vocab]` on the CPU."""
        ...


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


class EagerRunner:
    """Calls the model for each step.

    Args:
        model: on the CPU.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def logits(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """See `ModelRunner.logits`."""
        tokens = torch.tensor([[row.token] for row in rows])
        positions = [row.position for row in rows]
        logits = self._model(
            input_ids=tokens,
            position_ids=torch.tensor(positions)[:, None],
            use_cache=False,
            metadata=HostDecodeMetadata.of([row.allocation for row in rows], positions),
        ).logits
        last: torch.Tensor = logits[:, -1].float()
        return last


class CudaGraphRunner:
    """Replays CUDA graphs: a step's kernels take less time than launching them one by one.

    There is a graph for each power of two of rows. Rows that nobody needs read and write the slot that nobody has.

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
        self._idle = torch.tensor([[0], [0], [pool.slots], [pool.slots]])
        self._inputs = self._idle.repeat(1, sizes[-1]).to(pool.keys.device)
        self._staged = self._idle.repeat(1, sizes[-1]).pin_memory()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, torch.Tensor] = {}
        graph_memory = torch.cuda.graph_pool_handle()
        # The largest first: the others reuse its memory.
        for size in reversed(sizes):
            self._capture(model, size, graph_memory)

    def logits(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """See `ModelRunner.logits`."""
        size = next(size for size in sorted(self._graphs) if size >= len(rows))
        self._staged.copy_(self._idle)
        taken = [(row.token, row.position, row.allocation.start, row.allocation.start + row.position) for row in rows]
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

        # Kernels are compiled and libraries loaded before anything is captured.
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
