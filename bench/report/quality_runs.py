"""Read result files of `quality`, and check the fields that `plot` and `goals` use and that runs are comparable."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectrumkv.common.errors import InvalidArgumentError

# Arguments that must be equal in runs that are compared.
SAME_ARGUMENTS = ("text_sha256", "context", "scored", "skip_windows", "windows")
# Fields of each row, by the kind that `quality_row` writes. A row may have more fields.
ROW_TEXTS = ("policy", "codec", "scorer", "scope")
ROW_NUMBERS = ("budget_target", "budget_counted", "kl", "ppl_delta_pct", "windows")
# These are null for a single window, which has no confidence interval.
ROW_INTERVALS = ("kl_ci", "ppl_delta_pct_ci")
# Fields of `meta.model`; see `describe_model`.
MODEL_TEXTS = ("name", "weights_digest", "dtype")


def read_comparable(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the contents of result files of `quality` on the same windows with the same model.

    Raises:
        InvalidArgumentError: a file cannot be used (see `read_result`), or the runs differ in text, windows or model;
            the message names the difference.
    """
    results = [read_result(path) for path in paths]
    first = _circumstances(results[0])
    for path, result in zip(paths, results, strict=True):
        for name, value in _circumstances(result).items():
            if value != first[name]:
                raise InvalidArgumentError(
                    f"{path} has {name} {value!r} and {paths[0]} has {first[name]!r}; only runs on the same windows "
                    "of the same text with the same model can be compared"
                )
    return results


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a result file of `quality`.

    Raises:
        InvalidArgumentError: the file cannot be read, `quality` did not write it, or a field has the wrong kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror}; name a file that quality wrote") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}; name a file that quality wrote") from error
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
    # Python counts True and False as numbers.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(_is_number(one) for one in value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _circumstances(result: Mapping[str, Any]) -> dict[str, Any]:
    meta = result["meta"]
    chosen = {name: meta["args"].get(name) for name in SAME_ARGUMENTS}
    return chosen | {name: meta["model"].get(name) for name in ("weights_digest", "dtype")}
