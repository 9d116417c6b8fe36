"""Breaks a service from inside: the incubator installs this in its process, and a file switches it on."""

import ctypes
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spectrumkv.common.generation.prompt import PromptReader
from spectrumkv.common.kv.codecs.tiered import TieredEncoder
from spectrumkv.common.kv.segment import KvSegment
from spectrumkv.common.rpc.decode_methods import ArrivedPiece
from spectrumkv.decode_server import main as decode_main
from spectrumkv.decode_server.bases import BasisStore
from spectrumkv.decode_server.engine import DecodeEngine
from spectrumkv.decode_server.kv_pool import KvPool
from spectrumkv.decode_server.model_runner import DecodeRow, EagerRunner
from spectrumkv.decode_server.receiver import KvReceiver
from spectrumkv.prefill_server import main as prefill_main
from spectrumkv.prefill_server import service as prefill_service
from spectrumkv.prefill_server.engine.engine import PrefillEngine
from spectrumkv.v1 import decode_pb2

FAILING_STEP = "failing step"
LOST_DEVICE = "lost device"
FROZEN_STEP = "frozen step"
HELD_INTERPRETER = "held interpreter"
DEAD_ENGINE = "dead engine"
FROZEN_PASS = "frozen pass"
FROZEN_CODING = "frozen coding"
FROZEN_DECODING = "frozen decoding"
FROZEN_TOKENIZER = "frozen tokenizer"
FROZEN_SAMPLING = "frozen sampling"
HELD_LOCK = "held lock"
FROZEN_START = "frozen start"
NOT_FINITE = "not finite"
SLOW_UPLOAD = "slow upload"
# What the log says once something hangs.
FROZEN = "sabotage: this thread hangs"
# How often what waits for the switch to go looks for it.
LOOK_SECONDS = 0.05


def _fail() -> None:
    raise RuntimeError("injected")


def _lose_device() -> None:
    raise torch.AcceleratorError("CUDA error: injected")


def _freeze(*_: object) -> None:
    sys.stderr.write(f"{FROZEN}\n")
    sys.stderr.flush()
    threading.Event().wait()


def _wait_in_c(*_: object) -> None:
    """Wait without end in C for a lock that nobody lets go, as code that runs no Python and heeds no signal may."""
    sys.stderr.write(f"{FROZEN}\n")
    sys.stderr.flush()
    lock = ctypes.create_string_buffer(64)
    take = ctypes.CDLL(None).pthread_mutex_lock
    take(lock)
    take(lock)


def _spoil(model: torch.nn.Module) -> None:
    """Have the model compute NaN from its first layer on."""
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight").fill_(torch.nan)


def _hold_interpreter() -> None:
    """Wait without end in C, with Python's global lock."""
    while True:
        ctypes.PyDLL(None).pause()


IN_STEP: dict[str, Callable[[], None]] = {
    FAILING_STEP: _fail,
    LOST_DEVICE: _lose_device,
    FROZEN_STEP: _freeze,
    HELD_INTERPRETER: _hold_interpreter,
}


def _hold_lock(pool: KvPool, *_: object) -> None:
    with pool._lock:
        _freeze()


# Functions before which something happens: where they are found, their names, and what happens.
BEFORE: dict[str, Sequence[tuple[Any, str, Callable[..., None]]]] = {
    FROZEN_TOKENIZER: [(PromptReader, "read", _freeze)],
    FROZEN_SAMPLING: [(prefill_service, "sample_first", _freeze)],
    HELD_LOCK: [(KvPool, "reserve_each", _hold_lock)],
    FROZEN_START: [(prefill_main, "load_model", _wait_in_c), (decode_main, "load_model", _wait_in_c)],
}


def install(switch: Path) -> None:
    """Have the model's threads and those that code do what the file `switch` says, as long as it exists."""
    for trouble, places in BEFORE.items():
        for owner, name, happen in places:
            setattr(owner, name, _preceded(getattr(owner, name), trouble, happen, switch))
    _install_inside(switch)


def _preceded(function: Callable[..., Any], trouble: str, happen: Callable[..., None], switch: Path) -> Any:
    def called(*arguments: Any, **named: Any) -> Any:
        if switch.exists() and switch.read_text() == trouble:
            happen(*arguments)
        return function(*arguments, **named)

    return called


def _install_inside(switch: Path) -> None:
    """Break what cannot be broken from before it."""
    forward, end_step, run_batch = EagerRunner._forward, DecodeEngine._end_step, PrefillEngine._run_batch
    encode, write, receive = TieredEncoder.encode, KvReceiver._write, BasisStore.receive

    def told() -> str:
        return switch.read_text() if switch.exists() else ""

    def broken_forward(self: EagerRunner, rows: Sequence[DecodeRow]) -> torch.Tensor:
        IN_STEP.get(told(), lambda: None)()
        return forward(self, rows)

    def broken_end_step(self: DecodeEngine, finished: Any) -> None:
        if told() == DEAD_ENGINE:
            _fail()
        end_step(self, finished)

    def broken_run_batch(self: PrefillEngine, batch: Any) -> None:
        if told() == FROZEN_PASS:
            _freeze()
        if told() == NOT_FINITE:
            _spoil(self._model)
        run_batch(self, batch)

    def broken_encode(self: TieredEncoder, capture: Any) -> Iterator[KvSegment]:
        if told() == FROZEN_CODING:
            _freeze()
        yield from encode(self, capture)

    def broken_write(self: KvReceiver, segment: KvSegment) -> Any:
        if told() == FROZEN_DECODING:
            _freeze()
        return write(self, segment)

    def slow_receive(self: BasisStore, pieces: Iterator[ArrivedPiece]) -> int:
        first = next(pieces)
        # Questions are answered at once.
        while isinstance(first, decode_pb2.PutBasisRequest) and first.part and told() == SLOW_UPLOAD:
            threading.Event().wait(LOOK_SECONDS)
        return receive(self, itertools.chain([first], pieces))

    BasisStore.receive = slow_receive  # type: ignore[method-assign]
    EagerRunner._forward = broken_forward  # type: ignore[method-assign]
    DecodeEngine._end_step = broken_end_step  # type: ignore[method-assign]
    PrefillEngine._run_batch = broken_run_batch  # type: ignore[method-assign]
    TieredEncoder.encode = broken_encode  # type: ignore[method-assign]
    KvReceiver._write = broken_write  # type: ignore[method-assign]
