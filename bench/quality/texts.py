"""Read the texts that quality is measured on, and cut them into windows of context and scored tokens."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectrumkv.common.errors import InvalidArgumentError
from spectrumkv.common.generation.beginning import TextTokenizer, beginning_token, begun

CODE, DIALOGUE = "code", "dialogue"
# Length of the code text: that of WikiText-2's test split. Tokenizing more would only take longer.
CODE_CHARACTERS = 1_250_000


def load_text(name: Path) -> str:
    """Return a text.

    Args:
        name: "code", "dialogue", or a file of UTF-8 text. A file that is named "code" or "dialogue" needs its folder
            before the name.

    Raises:
        InvalidArgumentError: the file cannot be read, or it is not UTF-8.
        FailedPreconditionError: the dialogues cannot be made.
    """
    if str(name) == CODE:
        return standard_library()
    if str(name) == DIALOGUE:
        # Only dialogues need a model.
        from spectrumkv.bench.quality.dialogue import dialogues

        return dialogues()
    return read_text(name)


def standard_library() -> str:
    """Return the sources of Python's standard library, module after module by name, up to `CODE_CHARACTERS`.

    Another release of Python has other sources; `meta.args.text_sha256` tells them apart.
    """
    sources: list[str] = []
    length = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.name):
        if length >= CODE_CHARACTERS:
            break
        sources.append(path.read_text(encoding="utf-8"))
        length += len(sources[-1])
    return "\n\n".join(sources)[:CODE_CHARACTERS]


@dataclass(frozen=True)
class Window:
    """Hold a piece of text as the services would see it.

    Attributes:
        index: index of the window, from 0 at the start of the text.
        context: the prompt.
        following: tokens that are read over the received KV.
        targets: the token after each of `following`, which that one predicts.

    The first of `following` is the token after the prompt. Prefill predicts it over exact KV, so it is no target.
    """

    index: int
    context: tuple[int, ...]
    following: tuple[int, ...]
    targets: tuple[int, ...]


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        InvalidArgumentError: the file cannot be read, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(f"--text {path}: {error.strerror}; name a file of UTF-8 text") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"--text {path} is not UTF-8: {error}") from error


def text_digest(text: str) -> str:
    """Return the SHA-256 of the text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def cut(tokenizer: TextTokenizer, text: str, context: int, scored: int, skip: int, count: int) -> list[Window]:
    """Cut a text into windows of `context` + `scored` tokens, one after another.

    A window's last target is the first token of the next window's context. If the tokenizer puts a
    beginning-of-sequence token before a text, that token replaces the first token of every context.

    Args:
        tokenizer: the model's tokenizer.
        text: the whole text.
        context: tokens of each prompt.
        scored: tokens scored in each window.
        skip: windows to skip at the start of the text.
        count: how many windows to return; 0 is all.

    Returns:
        The windows.

    Raises:
        InvalidArgumentError: a number is out of its range, or the text has no such windows.
    """
    for name, value, least in (("context", context, 2), ("scored", scored, 1), ("skip-windows", skip, 0)):
        if value < least:
            raise InvalidArgumentError(f"--{name} is {value}; allowed: {least} or more")
    if count < 0:
        raise InvalidArgumentError(f"--windows is {count}; allowed: 1 or more, or 0 for all")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    available = max(0, (len(ids) - 1) // (context + scored))
    wanted = count or available - skip
    if wanted < 1 or skip + wanted > available:
        raise InvalidArgumentError(
            f"the text has {len(ids)} tokens, that is {available} windows of {context} + {scored}; "
            f"--skip-windows {skip} --windows {count} asks for others"
        )
    beginning = beginning_token(tokenizer)
    return [_window(ids, index, context, scored, beginning) for index in range(skip, skip + wanted)]


def _window(ids: Sequence[int], index: int, context: int, scored: int, beginning: int | None) -> Window:
    start = index * (context + scored)
    middle, end = start + context, start + context + scored
    prompt = begun(ids[start:middle], beginning)
    return Window(index, tuple(prompt), tuple(ids[middle:end]), tuple(ids[middle + 1 : end + 1]))
