"""Knows the decode workers: which one a request gets, the lease on it, and the upload of the basis."""

from spectrumkv.prefill_server.workers.dispatch import Dispatch
from spectrumkv.prefill_server.workers.lease import DecodeLease
from spectrumkv.prefill_server.workers.pool import WorkerPool
from spectrumkv.prefill_server.workers.worker import DecodeWorker

__all__ = ["DecodeLease", "DecodeWorker", "Dispatch", "WorkerPool"]
