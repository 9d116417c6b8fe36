import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from spectrumkv.common.errors import FailedPreconditionError, ResourceExhaustedError
from spectrumkv.common.kv.geometry import KvGeometry
from spectrumkv.common.service import machine
from spectrumkv.common.telemetry.metrics import Metrics
from spectrumkv.decode_server.kv_pool import Allocation, KvPool

GEOMETRY = KvGeometry(layers=2, kv_heads=3, head_dim=4, native_dtype=torch.float32)
SLOT_BYTES = 2 * 2 * 3 * 4 * 4


def pool(slots: int) -> tuple[KvPool, Metrics]:
    metrics = Metrics(CollectorRegistry())
    return KvPool(GEOMETRY, slots * SLOT_BYTES + SLOT_BYTES - 1, torch.device("cpu"), metrics), metrics


def test_memory_is_counted_in_whole_slots() -> None:
    made, _ = pool(10)
    assert (made.slot_bytes, made.slots, made.used) == (SLOT_BYTES, 10, 0)
    with pytest.raises(FailedPreconditionError, match="--kv-memory of 95 bytes holds no slot; one takes 192"):
        KvPool(GEOMETRY, 95, torch.device("cpu"), Metrics(CollectorRegistry()))


def test_memory_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would be given it, and the process ended once it is written to."""
    device, metrics = torch.device("cpu"), Metrics(CollectorRegistry())
    with pytest.raises(FailedPreconditionError, match=r"--kv-memory is 2\d+ bytes, .* has \d+, of which"):
        KvPool(GEOMETRY, 2 * 10**15, device, metrics)
    # A machine that does not say, and an allocator that says no.
    monkeypatch.setattr(machine, "bytes_left", lambda: None)
    with pytest.raises(
        FailedPreconditionError, match="--kv-memory of 4611686018427387904 bytes cannot be had on cpu"
    ):
        KvPool(GEOMETRY, 1 << 62, device, metrics)


def test_a_request_larger_than_the_pool_can_never_be_served() -> None:
    made, _ = pool(10)
    with pytest.raises(FailedPreconditionError, match="need 11 slots, and this decode worker has 10"):
        made.reserve(11)


def test_a_full_pool_refuses_and_names_what_is_free() -> None:
    made, metrics = pool(10)
    with made.reserve(7):
        assert metrics.registry.get_sample_value("spectrumkv_kv_slots_used_ratio") == 0.7
        assert metrics.registry.get_sample_value("spectrumkv_kv_bytes_resident") == 7 * SLOT_BYTES
        with pytest.raises(ResourceExhaustedError, match="no run of 4 free KV slots; 3 of 10 are free") as caught:
            made.reserve(4)
        assert caught.value.retry_after_seconds > 0


def fail_while_holding_slots(made: KvPool) -> None:
    with made.reserve(7):
        raise RuntimeError("whatever")


def test_slots_are_freed_by_leaving_whatever_happens() -> None:
    made, metrics = pool(10)
    with pytest.raises(RuntimeError):
        fail_while_holding_slots(made)
    assert made.used == 0
    assert metrics.registry.get_sample_value("spectrumkv_kv_bytes_resident") == 0


def test_releasing_twice_frees_nobody_else() -> None:
    made, _ = pool(10)
    first = made.reserve(5)
    first.release()
    second = made.reserve(5)
    first.release()
    assert made.used == 5
    second.release()
    assert made.used == 0


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), max_size=40))
def test_allocations_never_overlap(steps: list[tuple[int, int]]) -> None:
    made, _ = pool(20)
    held: list[Allocation] = []
    for capacity, release in steps:
        if release < len(held):
            held.pop(release).release()
        try:
            held.append(made.reserve(capacity))
        except ResourceExhaustedError:
            gaps = sorted([(one.start, one.start + one.capacity) for one in held] + [(20, 20)])
            starts = [0, *(end for _, end in gaps)]
            assert max(gap[0] - start for gap, start in zip(gaps, starts, strict=False)) < capacity
        spans = sorted((one.start, one.start + one.capacity) for one in held)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
        assert all(start >= 0 and end <= 20 for start, end in spans)
        assert made.used == sum(one.capacity for one in held)


def test_dropped_tokens_are_masked_and_leave_no_nan() -> None:
    made, _ = pool(8)
    made.keys.fill_(torch.nan)
    made.values.fill_(torch.nan)
    allocation = made.reserve(6)
    allocation.drop(1, torch.tensor([0, 3]))
    allocation.drop(1, torch.tensor([4]))
    assert allocation.keep_mask(0) is None
    kept = allocation.keep_mask(1)
    assert kept is not None
    assert kept.tolist() == [False, True, True, False, False, True]
    assert allocation.keys(1, 0, 6)[:, [0, 3, 4]].eq(0).all()
    assert allocation.values(1, 0, 6)[:, [1, 2, 5]].isnan().all()


def test_who_has_the_slots_next_sees_all_of_them() -> None:
    made, _ = pool(8)
    with made.reserve(6) as allocation:
        allocation.drop(1, torch.tensor([0, 3]))
        assert not made.keep_mask.all()
    assert made.keep_mask.all()


def test_free_slots_in_pieces_show() -> None:
    made, metrics = pool(20)

    def free_run() -> float | None:
        return metrics.registry.get_sample_value("spectrumkv_kv_slots_free_run_ratio")

    assert free_run() == 1
    first, second, third = (made.reserve(5) for _ in range(3))
    assert free_run() == 5 / 20
    second.release()
    assert (made.used, free_run()) == (10, 5 / 20)
    third.release()
    assert free_run() == 15 / 20
    first.release()
    assert free_run() == 1
