"""The texts that quality is measured on: a file, or one of the kinds that every installation has."""

import sysconfig
from pathlib import Path

from spectrumkv.bench.quality.windows import read_text

CODE, DIALOGUE = "code", "dialogue"
# Tokenizing more takes longer than anybody measures on it; WikiText-2's test split is as long.
CODE_CHARACTERS = 1_250_000


def load_text(name: Path) -> str:
    """Return a text.

    Args:
        name: "code", "dialogue", or a file of UTF-8 text. A file of one of these names needs its folder before it.

    Raises:
        InvalidArgumentError: there is no such file, or it is not UTF-8.
        FailedPreconditionError: the dialogues cannot be made.
    """
    if str(name) == CODE:
        return standard_library()
    if str(name) == DIALOGUE:
        # Only making them needs a model.
        from spectrumkv.bench.quality.dialogue import dialogues

        return dialogues()
    return read_text(name)


def standard_library() -> str:
    """The sources of the running Python's standard library, module after module by name, up to a length.

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
