"""How one worker's chance at a request may end."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from spectrumkv.common.errors import (
    BasisMissingError,
    CancelledError,
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpectrumKVError,
    UnavailableError,
)
from spectrumkv.common.service.config import Address
from spectrumkv.prefill_server.workers.circuit_breaker import FAILURES_TO_EJECT, CircuitBreaker
from spectrumkv.prefill_server.workers.dispatch import Dispatch, pass_over_reason

REFUSED = [
    (ResourceExhaustedError("full", 1.0), "full"),
    (UnavailableError("gone"), "unavailable"),
    (FailedPreconditionError("another model"), "unfit"),
    (BasisMissingError("no basis"), "unfit"),
]


class FakeLease(contextlib.nullcontext[None]):
    """A lease whose errors are the worker's where the test says so."""

    def __init__(self, refusal: SpectrumKVError | None) -> None:
        super().__init__()
        self.worker_error: SpectrumKVError | None = None
        self.refusal = refusal

    def wait_for_admission(self) -> None:
        if self.refusal is not None:
            self.fail(self.refusal)

    def fail(self, error: SpectrumKVError) -> None:
        self.worker_error = error
        raise error


class FakeWorker:
    """Counts the slots that are held on it, and answers every request alike."""

    def __init__(self, refusal: SpectrumKVError | None = None) -> None:
        self.address = Address("127.0.0.1", 1)
        self.breaker = CircuitBreaker()
        self.lease = FakeLease(refusal)
        self.held = 0
        self.refusal = refusal
        self.basis_upload = SimpleNamespace(count=3, wait=self.wait)
        self.waited_since: list[int] = []

    @contextlib.contextmanager
    def holding(self, slots: int) -> Iterator[None]:
        self.held += slots
        try:
            yield
        finally:
            self.held -= slots

    def open_lease(self, pipeline: Any, scope: Any) -> Any:
        return self.lease

    def wait(self, since: int, scope: Any, patience: float | None) -> bool:
        assert self.held == 7
        self.waited_since.append(since)
        if self.refusal is not None:
            raise self.refusal
        return True


def dispatch_to(worker: FakeWorker) -> Dispatch:
    return Dispatch(cast(Any, worker), 7, cast(Any, None))


@pytest.mark.parametrize(("refusal", "reason"), REFUSED)
def test_a_refusal_is_kept_and_the_request_goes_on(refusal: SpectrumKVError, reason: str) -> None:
    worker = FakeWorker(refusal)
    dispatch = dispatch_to(worker)
    with dispatch, dispatch.open_lease(cast(Any, None)):
        pytest.fail("a worker that refuses gives no lease")
    assert dispatch.error is refusal
    assert not dispatch.admitted
    assert worker.held == 0
    assert pass_over_reason(refusal, admitted=False) == reason


def test_what_no_other_worker_mends_ends_the_request() -> None:
    worker = FakeWorker(CancelledError("the caller left"))
    dispatch = dispatch_to(worker)
    with pytest.raises(CancelledError), dispatch:
        dispatch.open_lease(cast(Any, None))
    assert dispatch.error is None
    assert worker.held == 0


def test_a_worker_that_is_lost_before_the_commit_is_replaced() -> None:
    worker = FakeWorker()
    dispatch = dispatch_to(worker)
    with dispatch, dispatch.open_lease(cast(Any, None)):
        assert worker.held == 7
        raise UnavailableError("gone")
    assert dispatch.admitted
    assert dispatch.error is not None
    assert worker.held == 0


def test_after_the_commit_a_lost_worker_ends_the_request() -> None:
    dispatch = dispatch_to(FakeWorker())
    dispatch.commit()
    with pytest.raises(UnavailableError), dispatch, dispatch.open_lease(cast(Any, None)):
        raise UnavailableError("gone")
    assert dispatch.error is None


def test_an_admitted_request_that_is_refused_later_ends() -> None:
    dispatch = dispatch_to(FakeWorker())
    with pytest.raises(ResourceExhaustedError), dispatch, dispatch.open_lease(cast(Any, None)):
        raise ResourceExhaustedError("full", 1.0)
    assert dispatch.error is None


@pytest.mark.parametrize(
    "error", [InternalError("a step failed"), DataLossError("damaged", "crc"), UnavailableError("x")]
)
def test_a_request_that_a_worker_fails_before_the_commit_goes_on(error: SpectrumKVError) -> None:
    worker = FakeWorker()
    for _ in range(FAILURES_TO_EJECT):
        assert not worker.breaker.ejected
        dispatch = dispatch_to(worker)
        with dispatch, dispatch.open_lease(cast(Any, None)):
            worker.lease.fail(error)
        assert dispatch.error is error
    assert worker.breaker.ejected
    assert pass_over_reason(error, admitted=True) == ("lost" if isinstance(error, UnavailableError) else "failed")


@pytest.mark.parametrize("error", [InternalError("no decoder for it"), DataLossError("damaged", "crc")])
def test_a_request_that_a_worker_fails_in_place_of_admitting_it_goes_on(error: SpectrumKVError) -> None:
    worker = FakeWorker(error)
    for _ in range(FAILURES_TO_EJECT):
        assert not worker.breaker.ejected
        dispatch = dispatch_to(worker)
        with dispatch, dispatch.open_lease(cast(Any, None)):
            pytest.fail("a worker that fails gives no lease")
        assert dispatch.error is error
        assert not dispatch.admitted
    assert worker.breaker.ejected
    assert pass_over_reason(error, admitted=False) == "failed"


def test_what_a_worker_calls_the_callers_fault_counts_once_another_admits_it() -> None:
    worker = FakeWorker(InvalidArgumentError("a bad request"))
    for _ in range(FAILURES_TO_EJECT):
        assert not worker.breaker.ejected
        dispatch = dispatch_to(worker)
        with dispatch, dispatch.open_lease(cast(Any, None)):
            pytest.fail("a worker that refuses gives no lease")
        assert dispatch.doubted
        assert pass_over_reason(cast(SpectrumKVError, dispatch.error), admitted=False) == "unfit"
        assert not worker.breaker.ejected
        dispatch.refuted()
    assert worker.breaker.ejected


def test_an_admitted_request_that_becomes_the_callers_fault_ends() -> None:
    worker = FakeWorker()
    dispatch = dispatch_to(worker)
    with pytest.raises(InvalidArgumentError), dispatch, dispatch.open_lease(cast(Any, None)):
        worker.lease.fail(InvalidArgumentError("End has another token"))
    assert not dispatch.doubted


def test_a_worker_that_is_away_is_not_ejected_for_that() -> None:
    worker = FakeWorker(UnavailableError("gone"))
    for _ in range(2 * FAILURES_TO_EJECT):
        dispatch = dispatch_to(worker)
        with dispatch:
            dispatch.open_lease(cast(Any, None))
    assert not worker.breaker.ejected


def test_what_the_worker_fails_after_the_commit_counts_against_it_too() -> None:
    worker = FakeWorker()
    for _ in range(FAILURES_TO_EJECT):
        dispatch = dispatch_to(worker)
        dispatch.commit()
        with pytest.raises(InternalError), dispatch, dispatch.open_lease(cast(Any, None)):
            worker.lease.fail(InternalError("a step failed"))
    assert worker.breaker.ejected


@pytest.mark.parametrize(
    "error", [InternalError("prefill's own"), CancelledError("the caller left"), ResourceExhaustedError("full", 1.0)]
)
def test_what_is_not_the_workers_fault_does_not_count_against_it(error: SpectrumKVError) -> None:
    worker = FakeWorker()
    for _ in range(2 * FAILURES_TO_EJECT):
        dispatch = dispatch_to(worker)
        with pytest.raises(type(error)), dispatch, dispatch.open_lease(cast(Any, None)):
            raise error
    assert not worker.breaker.ejected


def test_a_worker_that_shuts_down_in_order_does_not_fail() -> None:
    worker = FakeWorker()
    for _ in range(2 * FAILURES_TO_EJECT):
        dispatch = dispatch_to(worker)
        with dispatch, dispatch.open_lease(cast(Any, None)):
            worker.lease.fail(UnavailableError("shutting down", 1.0))
    assert not worker.breaker.ejected


def test_the_basis_is_waited_for_as_of_before_the_worker_was_asked() -> None:
    worker = FakeWorker()
    dispatch = dispatch_to(worker)
    worker.basis_upload.count = 4
    assert dispatch.wait_for_basis(None)
    assert worker.waited_since == [3]
    assert worker.held == 0


def test_a_worker_that_refuses_the_basis_is_passed_over() -> None:
    dispatch = dispatch_to(FakeWorker(UnavailableError("gone")))
    assert not dispatch.wait_for_basis(None)
    assert isinstance(dispatch.error, UnavailableError)
