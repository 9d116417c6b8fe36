"""Puts a worker's halves together, once vLLM has laid out its pages.

Only worker processes import this: with it come numba and the kernels (see `register`).
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError
from spectrumkv.common.kv.codecs.base import codecs, parse_basis, prepare_codecs
from spectrumkv.common.kv.codecs.basis import Basis
from spectrumkv.common.kv.geometry import HeadRange, KvGeometry
from spectrumkv.common.kv.policies import policies
from spectrumkv.common.model.cache import UnwritableCacheError
from spectrumkv.common.model.description import spec_of_directory
from spectrumkv.common.model.files.directory import find_model
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.common.rpc.server import Server
from spectrumkv.common.security import ChannelSecurity
from spectrumkv.common.security.tls import TlsFiles, optional_path
from spectrumkv.kernels import attention_scores
from spectrumkv.prefill_server.tuning.basis_cache import kept_basis
from spectrumkv.vllm_plugin.decode.fetcher import ConsumerRank
from spectrumkv.vllm_plugin.decode.worker import ConsumerWorker
from spectrumkv.vllm_plugin.layers import EngineLayer
from spectrumkv.vllm_plugin.options import ConnectorOptions
from spectrumkv.vllm_plugin.prefill.coder import Coder
from spectrumkv.vllm_plugin.prefill.outbox import Outbox
from spectrumkv.vllm_plugin.prefill.plans import Planner
from spectrumkv.vllm_plugin.prefill.service import TransferService, start_server
from spectrumkv.vllm_plugin.prefill.worker import ProducerWorker
from spectrumkv.vllm_plugin.stats import Tally

__all__ = ["EngineModel", "Producer", "consumer_worker", "start_producer"]


@dataclass(frozen=True, eq=False)
class EngineModel:
    """The model of an engine, and this worker's part of it.

    Attributes:
        name: local directory or hub name.
        spec: what both sides must agree on.
        geometry: of all KV heads.
        heads: KV heads of this rank.
        rank: of this worker.
        ranks: of the tensor-parallel group.
        layers: in order, with this rank's pages.
        block_tokens: tokens of the scheduler's blocks.
    """

    name: str
    spec: ModelSpec
    geometry: KvGeometry
    heads: HeadRange
    rank: int
    ranks: int
    layers: list[EngineLayer]
    block_tokens: int

    @classmethod
    def of(cls, name: str, layers: list[EngineLayer], rank: int, ranks: int, block_tokens: int) -> "EngineModel":
        """Describe the model of an engine.

        Args:
            name: local directory or hub name.
            layers: in order.
            rank: of this worker.
            ranks: of the tensor-parallel group.
            block_tokens: tokens of the scheduler's blocks.

        Returns:
            The description.

        Raises:
            FailedPreconditionError: the engine's cache is not the one that the model's configuration describes.
        """
        _, directory = find_model(name)
        dtype = layers[0].pages.dtype
        spec = spec_of_directory(directory, dtype)
        geometry = KvGeometry(spec.layers, spec.kv_heads, spec.head_dim, dtype)
        heads = HeadRange.of_rank(rank, ranks, spec.kv_heads)
        found = (len(layers), layers[0].kv_heads, layers[0].head_dim)
        if found != (spec.layers, heads.count, spec.head_dim):
            raise FailedPreconditionError(
                f"rank {rank} of {ranks} has (layers, KV heads, head_dim) = {found}, and the model {name} gives it "
                f"{(spec.layers, heads.count, spec.head_dim)}"
            )
        return cls(name, spec, geometry, heads, rank, ranks, layers, block_tokens)

    @property
    def hands_out(self) -> bool:
        """Return whether this rank is the first one with its KV heads, which others repeat where heads are few."""
        before = (HeadRange.of_rank(one, self.ranks, self.geometry.kv_heads) for one in range(self.rank))
        return self.heads not in before


@dataclass(frozen=True, eq=False)
class Producer:
    """What a producing worker runs.

    Attributes:
        worker: taps the model.
        outbox: holds what was coded.
        coder: codes.
        server: hands it out.
    """

    worker: ProducerWorker
    outbox: Outbox
    coder: Coder
    server: Server

    def stop(self) -> None:
        """End the server and the coder."""
        self.server.refuse()
        self.coder.stop()


def start_producer(model: EngineModel, options: ConnectorOptions, tally: Tally) -> Producer:
    """Find the basis, and serve.

    Args:
        model: of the engine.
        options: of the connector.
        tally: counts what was coded.

    Returns:
        What runs now.

    Raises:
        SpectrumKVError: the options cannot be kept with this model, or the address is not free.
    """
    basis = _basis(model, options)
    part = basis
    if basis is not None and model.heads.count < model.geometry.kv_heads:
        part = basis.of_heads(model.heads)
    geometry = model.geometry.of_heads(model.heads)
    planner = Planner(options, geometry, part)
    planner.check()
    prepare_codecs(geometry)
    attention_scores.prepare()
    outbox = Outbox(
        options.outbox_memory, options.time_to_live, lambda: tally.add("kv_transfers_orphaned_total", "expired")
    )
    coder = Coder(
        planner,
        b"" if basis is None else basis.digest,
        geometry,
        model.heads,
        outbox,
        options.chunk_bytes,
        model.layers[0].pages.device,
        tally,
    )
    worker = ProducerWorker(
        {one.name: one for one in model.layers}, model.block_tokens, options.window, coder, outbox
    )
    service = TransferService(model.spec, model.heads, outbox, basis, options.fetch_timeout)
    coder.start()
    server, _ = start_server(service, options, model.rank, lambda code: None)
    return Producer(worker, outbox, coder, server)


def consumer_worker(model: EngineModel, options: ConnectorOptions, tally: Tally) -> ConsumerWorker:
    """Make the consuming half.

    Args:
        model: of the engine.
        options: of the connector.
        tally: counts loads.

    Returns:
        The half; it connects to producers when requests name them.
    """
    prepare_codecs(model.geometry.of_heads(model.heads))
    tls = None if options.tls_ca is None else TlsFiles.named(options.tls_cert, options.tls_key, options.tls_ca)
    security = ChannelSecurity(
        tls=tls,
        token_file=optional_path(options.token_file),
        named_by="token_file",
        allow_plaintext=options.allow_plaintext,
        allow_proxy=False,
    )
    security.check()
    rank = ConsumerRank(model.spec, model.geometry, model.rank, model.ranks, model.layers, model.block_tokens)
    return ConsumerWorker(rank, options, security, tally)


def _basis(model: EngineModel, options: ConnectorOptions) -> Basis | None:
    """Return the basis of all KV heads; None where the connector's policy needs none and no file names one.

    Raises:
        InvalidArgumentError: the file cannot be read, or is no basis for this model.
    """
    file = options.basis_file
    if file is not None:
        try:
            return parse_basis(file.read_bytes(), model.geometry)
        except OSError as error:
            raise InvalidArgumentError(f"basis {file} cannot be read: {error.strerror}") from error
    codec = policies.get(options.policy).codec
    if codec is None or not codecs.get(codec).needs_basis:
        return None
    find = _calibration(model)
    try:
        return kept_basis(model.spec, model.geometry, find)
    except UnwritableCacheError:
        return find()


def _calibration(model: EngineModel) -> Callable[[], Basis]:
    """Return what finds the basis in a process of its own, which gives its memory back when it ends."""

    def find() -> Basis:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "basis.safetensors"
            command = [sys.executable, "-m", "spectrumkv.vllm_plugin.calibration", model.name, str(file)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
            if ended.returncode:
                raise FailedPreconditionError(
                    f"the basis of {model.name} could not be found: {ended.stderr.strip()[-400:]}; find it elsewhere "
                    "with `spectrumkv basis export` and name the file in the option basis"
                )
            return parse_basis(file.read_bytes(), model.geometry)

    return find
