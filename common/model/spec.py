"""What prefill and decode must agree on before one may use the other's KV, and the digests that stand for a model."""

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from spectrumkv.common.errors import FailedPreconditionError, InvalidArgumentError, quoted
from spectrumkv.common.model.cache import cache_directory, read_entry, sha256_of_json, write_entry
from spectrumkv.common.model.files.directory import weight_files
from spectrumkv.common.model.parameters import rope_parameters
from spectrumkv.v1 import kv_pb2

# The name of a kept digest in the log.
_DIGEST = "the digest of the weights"
_DTYPES = ("float32", "float16", "bfloat16")
# No more than so many parameters, of so many characters, are taken from another process: a refusal repeats them.
_MOST_PARAMETERS, _LONGEST_NAME, _LONGEST_VALUE = 64, 64, 4096
# What a difference shows for a parameter that one side does not have.
_ABSENT = "not given"


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
    in; `context_length` is the longest prompt plus completion in tokens; `parameters` are sorted names and values of
    what else the model computes with, see `model_parameters`.

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
    parameters: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.architecture:
            raise InvalidArgumentError("the model spec names no architecture")
        for name in ("weights_digest", "rope_digest", "tokenizer_digest"):
            if not re.fullmatch("[0-9a-f]{64}", getattr(self, name)):
                raise InvalidArgumentError(
                    f"the model spec's {name} is {quoted(getattr(self, name))}; expected 64 hex digits"
                )
        for name in ("layers", "kv_heads", "head_dim", "vocab_size", "context_length"):
            if not 1 <= getattr(self, name) < 1 << 32:
                raise InvalidArgumentError(f"the model spec's {name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in _DTYPES:
            raise InvalidArgumentError(
                f"the model spec's dtype is {quoted(self.dtype)}; allowed: {', '.join(_DTYPES)}"
            )
        if (
            len(self.parameters) > _MOST_PARAMETERS
            or len(dict(self.parameters)) < len(self.parameters)
            or any(len(name) > _LONGEST_NAME or len(value) > _LONGEST_VALUE for name, value in self.parameters)
        ):
            raise InvalidArgumentError(
                f"the model spec's parameters have more than {_MOST_PARAMETERS} entries, a name twice, or a name or "
                f"value of more than {_LONGEST_NAME} or {_LONGEST_VALUE} characters"
            )

    def differences(self, other: "ModelSpec") -> list[SpecDifference]:
        """Return in what `other` differs; nothing where the two agree.

        Args:
            other: the spec to compare with.

        Returns:
            The fields that differ, in the order of declaration, and each of the parameters that differs in the place
            of `parameters`.
        """
        mine, theirs = self._by_name(), other._by_name()
        return [
            SpecDifference(name, mine.get(name, _ABSENT), theirs.get(name, _ABSENT))
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]

    def _by_name(self) -> dict[str, str | int]:
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "parameters"}
        return plain | dict(self.parameters)

    def to_proto(self) -> kv_pb2.ModelSpec:
        """Return the message that crosses the network."""
        return kv_pb2.ModelSpec(
            **{one.name: getattr(self, one.name) for one in fields(self)} | {"parameters": dict(self.parameters)}
        )

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
        given = {one.name: getattr(message, one.name) for one in fields(cls)}
        return cls(**given | {"parameters": tuple(sorted(message.parameters.items()))})


def weights_digest(directory: Path, read: Collection[str] | None = None) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a model's tensors, in hexadecimal.

    The digest does not depend on how the tensors are distributed over files. It is kept in the cache directory under
    what tells the files from others, so that a restart reads no weights for it.

    Args:
        directory: holds the safetensors files.
        read: names of the tensors that the model has; others in the files are left out. None takes all.

    Raises:
        FailedPreconditionError: there are no safetensors files, or they change as they are read.
    """
    with weights_unchanged(directory) as fingerprint:
        entry = cache_directory() / "digests" / sha256_of_json([fingerprint, None if read is None else sorted(read)])
        digest = read_entry(entry, _DIGEST, _parse_digest)
        if digest is not None:
            return digest
        digest = _hash_weights(weight_files(directory), read)
    write_entry(entry, _DIGEST, digest)
    return digest


@contextmanager
def weights_unchanged(directory: Path) -> Iterator[str]:
    """Hold the files of a model's weights to what they were until the block ends.

    Args:
        directory: holds the safetensors files.

    Yields:
        What tells the files from others. Whoever replaces a file can give it the same name, size and modification
        time, but not the same inode or time of change.

    Raises:
        FailedPreconditionError: there are no safetensors files, or they are others now.
    """
    before = _fingerprint(directory)
    yield before
    if _fingerprint(directory) != before:
        raise FailedPreconditionError(
            f"the weights in {directory} were changed while they were read; start again when they are complete"
        )


def _fingerprint(directory: Path) -> str:
    facts = []
    for file in weight_files(directory):
        found = file.stat()
        facts.append((str(file.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return sha256_of_json(facts)


def _parse_digest(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"it holds {text[:80]!r}, which is not 64 hexadecimal digits")
    return text


def _hash_weights(files: tuple[Path, ...], read: Collection[str] | None) -> str:
    with ExitStack() as opened, ThreadPoolExecutor() as pool:
        # Tensors are views of the mapped files; hashlib releases the interpreter's lock as it reads them.
        tensors: dict[str, torch.Tensor] = {}
        for path in files:
            file = opened.enter_context(safe_open(path, framework="pt"))
            names = [name for name in file.keys() if read is None or name in read]  # noqa: SIM118 (not a mapping)
            tensors |= {name: file.get_tensor(name) for name in names}
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
    return sha256_of_json({"head_dim": head_dim, **rope_parameters(config)})


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 over vocabulary, merges, pre- and post-processing and special tokens, in hexadecimal.

    Args:
        tokenizer: the tokenizer. Its present padding and truncation are left out: they belong to a call, not to it.
    """
    backend = tokenizer.backend_tokenizer
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    # The library writes vocabularies by id and maps by key, so that equal tokenizers make equal texts.
    state = hashlib.sha256(backend.to_str().encode()).hexdigest()
    if padding is not None:
        backend.enable_padding(**padding)
    if truncation is not None:
        backend.enable_truncation(**truncation)
    special: Mapping[str, Any] = tokenizer.special_tokens_map
    return sha256_of_json({"backend": state, "special": {name: str(token) for name, token in special.items()}})
