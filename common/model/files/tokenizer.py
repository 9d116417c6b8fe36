"""Checks the files of a tokenizer, whose libraries say little of what is wrong in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from spectrumkv.common.model.files.configuration import read_object, refuse_fields
from spectrumkv.common.model.files.fields import (
    NULL,
    OBJECT,
    POSITIVE,
    TEXT,
    Allowed,
    either,
    list_of,
    misfits,
    shown,
)

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_WITH_CONTENT = Allowed(
    "an object with a content that is a text", lambda value: OBJECT.fits(value) and TEXT.fits(value.get("content"))
)
_TOKEN = either(TEXT, _WITH_CONTENT)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEXTS_BY_NAME = Allowed(
    "an object whose values are texts", lambda value: OBJECT.fits(value) and all(map(TEXT.fits, value.values()))
)
_TOKENS_BY_NAME = Allowed(
    "an object whose values are tokens", lambda value: OBJECT.fits(value) and all(map(_TOKEN.fits, value.values()))
)
_TOKENS_BY_ID = Allowed(
    "an object whose keys are token ids and whose values are objects with a content that is a text",
    lambda value: (
        OBJECT.fits(value) and all(key.isdecimal() and _WITH_CONTENT.fits(one) for key, one in value.items())
    ),
)
_RULES: dict[str, Allowed] = {
    "tokenizer_class": either(TEXT, NULL),
    **dict.fromkeys(_SPECIAL, either(_TOKEN, NULL)),
    "additional_special_tokens": either(list_of(_TOKEN), NULL),
    "extra_special_tokens": either(list_of(_TOKEN), _TOKENS_BY_NAME, NULL),
    "added_tokens_decoder": either(_TOKENS_BY_ID, NULL),
    "model_max_length": either(POSITIVE, NULL),
    # Some models have several templates, by name.
    "chat_template": either(TEXT, list_of(_TEXTS_BY_NAME), NULL),
}
# What tokenizer.json consists of, and the least that it may be.
_SECTIONS: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
_NEEDED = ("added_tokens", "model")


def check_tokenizer_config(directory: Path) -> None:
    """Refuse tokenizer_config.json where a field holds what none can: some are read only as requests come.

    Args:
        directory: the model's; without such a file there is nothing to check.

    Raises:
        FailedPreconditionError: the file cannot be read or holds such a field.
    """
    file = directory / TOKENIZER_CONFIG
    if file.exists():
        refuse_fields(file, misfits(read_object(file), _RULES))


def refuse_tokenizer(directory: Path, cause: Exception) -> None:
    """Say what in tokenizer.json made a library fail.

    Args:
        directory: the model's.
        cause: the library's error.

    Raises:
        FailedPreconditionError: something in the file is at fault; where nothing is found, nothing is raised.
    """
    file = directory / TOKENIZER
    if file.exists():
        refuse_fields(file, _unread_sections(read_object(file)), cause)


def _unread_sections(given: dict[str, Any]) -> Iterator[str]:
    """Yield which sections the library does not read, each tried alone, and the library's text on it."""
    for name in _NEEDED:
        if name not in given:
            yield f"it lacks {name}"
    for name in (one for one in _SECTIONS if one in given):
        try:
            tokenizers.Tokenizer.from_str(json.dumps(_SECTIONS | {name: given[name]}))
        except Exception as error:  # noqa: BLE001 (tokenizers raises Exception itself)
            yield f"{name} is {shown(given[name])}, which tokenizers {tokenizers.__version__} does not read ({error})"
