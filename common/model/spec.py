"""What prefill and decode must agree on before one may use the other's KV, and the digests that stand for a model."""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.model.cache import cache_directory, read_entry, sha256_of_json, write_entry
from spectrumkv.common.model.directory import weight_files
from spectrumkv.v1 import kv_pb2

# The name of a kept digest in the log.
_DIGEST = "the digest of the weights"
_DTYPES = ("float32", "float16", "bfloat16")


class SpecDifference(NamedTuple):
    """One field in which two specs differ."""

    field: str
    mine: str | int
    theirs: str | int

    def __str__(self) -> str:
        return f"{self.field} is {self.mine} here and {self.theirs} there"


@dataclass(frozen=True)
class ModelSpec:
    """The facts of a model that two processes must agree on before one may use the other's KV cache.

    Mirrors `spectrumkv.v1.ModelSpec`. Digests are SHA-256 in hexadecimal; `dtype` is what the model computes
    in; `context_length` is the longest prompt plus completion in tokens.

    Raises:
        InvalidArgumentError: a field is missing or cannot be right.
    """

    architecture: str
    weights_digest: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    rope_digest: str
    tokenizer_digest: str
    vocab_size: int
    context_length: int

    def __post_init__(self) -> None:
        if not self.architecture:
            raise InvalidArgumentError("the model spec names no architecture")
        for name in ("weights_digest", "rope_digest", "tokenizer_digest"):
            if not re.fullmatch("[0-9a-f]{64}", getattr(self, name)):
                raise InvalidArgumentError(
                    f"the model spec's {name} is {getattr(self, name)!r}; expected 64 hex digits"
                )
        for name in ("layers", "kv_heads", "head_dim", "vocab_size", "context_length"):
            if not 1 <= getattr(self, name) < 1 << 32:
                raise InvalidArgumentError(f"the model spec's {name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in _DTYPES:
            raise InvalidArgumentError(f"the model spec's dtype is {self.dtype!r}; valid: {', '.join(_DTYPES)}")

    def differences(self, other: "ModelSpec") -> list[SpecDifference]:
        """Return the fields in which `other` differs, in the order of declaration; none where the two agree."""
        pairs = ((one.name, getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        return [SpecDifference(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]

    def to_proto(self) -> kv_pb2.ModelSpec:
        """Return the message that crosses the network."""
        return kv_pb2.ModelSpec(**{one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def from_proto(cls, message: kv_pb2.ModelSpec) -> "ModelSpec":
        """Read the message that crossed the network.

        Args:
            message: what the other process sent.

        Returns:
            The spec.

        Raises:
            InvalidArgumentError: a field is missing or cannot be right.
        """
        return cls(**{one.name: getattr(message, one.name) for one in fields(cls)})


def weights_digest(directory: Path) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all tensors, in hexadecimal.

    The digest does not depend on how the tensors are distributed over files. It is kept in the cache directory under
    the files' paths, sizes and modification times, so that a restart reads no weights for it.

    Args:
        directory: holds the safetensors files.

    Raises:
        FailedPreconditionError: there are no safetensors files.
    """
    files = weight_files(directory)
    entry = cache_directory() / "digests" / _fingerprint(files)
    digest = read_entry(entry, _DIGEST, _parse_digest)
    if digest is None:
        digest = _hash_weights(files)
        write_entry(entry, _DIGEST, digest)
    return digest


def _fingerprint(files: tuple[Path, ...]) -> str:
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256_of_json(facts)


def _parse_digest(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"it holds {text[:80]!r}, which is not 64 hexadecimal digits")
    return text


def _hash_weights(files: tuple[Path, ...]) -> str:
    with ExitStack() as opened, ThreadPoolExecutor() as pool:
        # Tensors are views of the mapped files; hashlib releases the interpreter's lock as it reads them.
        tensors: dict[str, torch.Tensor] = {}
        for path in files:
            file = opened.enter_context(safe_open(path, framework="pt"))
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        names = sorted(tensors)
        hashes = pool.map(_hash_tensor, (tensors[name] for name in names))
        described = [
            (name, str(tensors[name].dtype), list(tensors[name].shape), digest)
            for name, digest in zip(names, hashes, strict=True)
        ]
    return sha256_of_json(described)


def _hash_tensor(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def rope_digest(config: PretrainedConfig, head_dim: int) -> str:
    """Return the SHA-256 over the parameters of the rotary embedding, in hexadecimal.

    Args:
        config: of a supported model.
        head_dim: elements of one key.
    """
    parameters = {name: value for name, value in config.rope_parameters.items() if value is not None}
    return sha256_of_json({"head_dim": head_dim, **parameters})


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 over vocabulary, merges, pre- and post-processing and special tokens, in hexadecimal.

    Args:
        tokenizer: the tokenizer. Its present padding and truncation are left out: they belong to a call, not to it.
    """
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("padding", "truncation"):
        state.pop(transient, None)
    special: Mapping[str, Any] = tokenizer.special_tokens_map
    return sha256_of_json({"backend": state, "special": {name: str(token) for name, token in special.items()}})
