"""Keeps the probe's verdicts between starts: a model is probed once for each way of coding it."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from google.protobuf import json_format

from spectrumkv.common.errors import SpectrumKVError
from spectrumkv.common.kv.codecs.base import Codec
from spectrumkv.common.model.cache import cache_directory
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerdictKey:
    """All that a verdict depends on.

    Attributes:
        model: weights and whatever else decides what the model computes.
        codecs: name and version of each codec that was tried.
        basis: SHA-256 of the basis that the spectral codec used, in hexadecimal digits.
        probe_version: of the questions and the way they are put.
    """

    model: ModelSpec
    codecs: tuple[tuple[str, int], ...]
    basis: str
    probe_version: int

    @classmethod
    def of(cls, model: ModelSpec, used: Sequence[Codec], basis_digest: bytes, probe_version: int) -> "VerdictKey":
        """Return the key of a verdict on `model` under the codecs `used`."""
        versions = tuple((codec.name, codec.version) for codec in used)
        return cls(model, versions, basis_digest.hex(), probe_version)

    def path(self) -> Path:
        """The file that keeps the verdict."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return cache_directory() / "probes" / f"{digest}.json"


def read_verdict(key: VerdictKey) -> ProbeVerdict | None:
    """Return the verdict kept under `key`, with the source "cache"; None where there is none that can be read."""
    path = key.path()
    try:
        message = json_format.Parse(path.read_text(encoding="utf-8"), prefill_pb2.ProbeVerdict())
        return replace(ProbeVerdict.from_proto(message), source="cache")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json_format.ParseError, SpectrumKVError) as error:
        logger.warning("cannot use the verdict kept in %s: %s; the model is probed again", path, error)
        return None


def keep_verdict(key: VerdictKey, verdict: ProbeVerdict) -> None:
    """Keep a verdict, in the place of an older one; a cache that cannot be written to only costs time later."""
    path = key.path()
    text = json_format.MessageToJson(verdict.to_proto(), preserving_proto_field_name=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, text)
    except OSError as error:
        logger.warning("cannot keep the verdict in %s: %s; the next start probes again", path, error)


def _write(path: Path, text: str) -> None:
    """Write a file that is never seen half-written, whoever else reads or writes it."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
