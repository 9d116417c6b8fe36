"""Reading what `quality` wrote, checked as far as `plot` and `goals` use it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError

# Of each row, by what `quality_row` writes there; more may be in it.
ROW_TEXTS = ("policy", "codec", "scorer", "scope")
ROW_NUMBERS = ("budget_target", "budget_counted", "kl", "ppl_delta_pct", "windows")
# One window has no confidence interval.
ROW_INTERVALS = ("kl_ci", "ppl_delta_pct_ci")
# Of `meta.model`; see `describe_model`.
MODEL_TEXTS = ("name", "weights_digest", "dtype")


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        InvalidArgumentError: it cannot be read, `quality` did not write it, or something in it is of the wrong kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror}; name a file that quality wrote") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is no JSON: {error}; name a file that quality wrote") from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) and "kl" in row for row in rows):
        raise InvalidArgumentError(f"{path} has no rows of quality; name a file that quality wrote")
    result: dict[str, Any] = content
    for number, row in enumerate(rows):
        _check_row(path, f"rows[{number}].", row)
    _check_meta(path, result)
    return result


def _check_row(path: Path, prefix: str, row: Mapping[str, Any]) -> None:
    for name in ROW_TEXTS:
        _check(path, prefix, row, name, _is_text, "a text")
    for name in ROW_NUMBERS:
        _check(path, prefix, row, name, _is_number, "a number")
    for name in ROW_INTERVALS:
        _check(path, prefix, row, name, _is_interval, "two numbers or null")


def _check_meta(path: Path, result: Mapping[str, Any]) -> None:
    _check(path, "", result, "meta", _is_object, "an object")
    meta = result["meta"]
    for name in ("args", "model"):
        _check(path, "meta.", meta, name, _is_object, "an object")
    for name in MODEL_TEXTS:
        _check(path, "meta.model.", meta["model"], name, _is_text, "a text")


def _check(
    path: Path,
    prefix: str,
    content: Mapping[str, Any],
    name: str,
    fits: Callable[[Any], bool],
    kind: str,
) -> None:
    if name not in content:
        found = "is missing"
    elif not fits(content[name]):
        found = f"is {content[name]!r}"
    else:
        return
    raise InvalidArgumentError(f"{path}: {prefix}{name} {found}; allowed: {kind}, as quality writes it")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    # To Python, true and false are numbers.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(_is_number(one) for one in value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)
