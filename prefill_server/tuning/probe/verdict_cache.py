"""Keeps the probe's verdicts between starts: a model is probed once for each way of coding it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from google.protobuf import json_format

from spectrumkv.common.kv.codecs.base import Codec
from spectrumkv.common.model.cache import cache_directory, read_entry, sha256_of_json, write_entry
from spectrumkv.common.model.spec import ModelSpec
from spectrumkv.prefill_server.verdict import ProbeVerdict
from spectrumkv.v1 import prefill_pb2

_ENTRY = "the probe's verdict"


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
        """Return the file that keeps the verdict."""
        return cache_directory() / "probes" / f"{sha256_of_json(asdict(self))}.json"


def read_verdict(key: VerdictKey) -> ProbeVerdict | None:
    """Return the verdict kept under `key`, with the source "cache"; None where there is none that can be used."""
    return read_entry(key.path(), _ENTRY, _parse)


def keep_verdict(key: VerdictKey, verdict: ProbeVerdict) -> None:
    """Keep a verdict, in the place of an older one; a cache that cannot be written to only costs time later."""
    text = json_format.MessageToJson(verdict.to_proto(), preserving_proto_field_name=True)
    write_entry(key.path(), _ENTRY, text)


def _parse(text: str) -> ProbeVerdict:
    try:
        message = json_format.Parse(text, prefill_pb2.ProbeVerdict())
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error
    return replace(ProbeVerdict.from_proto(message), source="cache")
