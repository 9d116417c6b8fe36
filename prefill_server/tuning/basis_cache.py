"""Keeps spectral bases between starts: a model is calibrated once."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from spectrumkv.common.errors import ContextTooShortError
from spectrumkv.common.kv.codecs.spectral.basis import SpectralBasis
from spectrumkv.common.model.cache import build_once, cache_directory, sha256_of_json
from spectrumkv.common.model.load import LoadedModel
from spectrumkv.prefill_server.tuning.calibration import Excerpt, calibrate
from spectrumkv.prefill_server.tuning.needle.haystack import haystack

# Raised whenever a calibration would find another basis than before.
CALIBRATION_VERSION = 1
EXCERPTS = 8
CONTEXT_TOKENS, CONTINUATION_TOKENS = 512, 128
# Shorter excerpts show too few tokens to tell the directions of a head apart.
FEWEST_CONTEXT_TOKENS = 64
BASIS_FILE = "basis.safetensors"


def resolve_basis(loaded: LoadedModel, on_excerpt: Callable[[int], None]) -> SpectralBasis:
    """Return the model's basis: the one in the cache, or one that is calibrated now and kept there.

    Args:
        loaded: the model; where it is calibrated, its attention is switched to prefill's.
        on_excerpt: told the number of excerpts done, of `EXCERPTS`, where the model is calibrated.

    Raises:
        ContextTooShortError: the model's context is too short.
        FailedPreconditionError: the cache cannot be written to.
    """
    key = {"model": asdict(loaded.spec), "calibration": CALIBRATION_VERSION}

    def build(directory: Path) -> None:
        basis = calibrate(loaded, default_excerpts(loaded), on_excerpt)
        (directory / BASIS_FILE).write_bytes(basis.serialized)

    def read(directory: Path) -> SpectralBasis:
        basis = SpectralBasis.from_bytes((directory / BASIS_FILE).read_bytes())
        basis.check_fits(loaded.geometry)
        return basis

    return build_once(cache_directory() / "bases" / sha256_of_json(key), "the model's basis", build, read)


def default_excerpts(loaded: LoadedModel) -> list[Excerpt]:
    """Return excerpts from the project's own prose.

    Raises:
        ContextTooShortError: the model's context is too short.
    """
    length = min(CONTEXT_TOKENS + CONTINUATION_TOKENS, loaded.context_length)
    context = length * CONTEXT_TOKENS // (CONTEXT_TOKENS + CONTINUATION_TOKENS)
    if context < FEWEST_CONTEXT_TOKENS:
        fewest = -(-FEWEST_CONTEXT_TOKENS * (CONTEXT_TOKENS + CONTINUATION_TOKENS) // CONTEXT_TOKENS)
        raise ContextTooShortError(
            f"calibration needs a context of {fewest} tokens and more, and {loaded.name} has {loaded.context_length}"
        )
    text = "".join(haystack(0).sentences)
    ids = torch.tensor(loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    starts = range(0, len(ids) - length + 1, max(1, (len(ids) - length) // (EXCERPTS - 1)))
    return [Excerpt(ids[start : start + length], context) for start in list(starts)[:EXCERPTS]]
