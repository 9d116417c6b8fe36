"""Show a prompt in the terminal, each token by the precision that its KV was sent at."""

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.style import Style
from rich.text import Text

from spectrumkv.client.completion import PromptToken
from spectrumkv.client.kv_map import LEVELS, KvMap, Level, level_of

# A piece of a token's text on one line, and the token's level.
Piece = tuple[str, Level]

# Shown where a token ends a line of the prompt.
LINE_END = "↵"
# Lightness of a colour, from 0 to 255, from which on black text is easier to read on it than white.
LIGHT = 120


def print_map(console: Console, tokens: Iterable[PromptToken], kv_map: KvMap) -> None:
    """Print the prompt and a legend: in colours, or with a line of marks below each line where there are none.

    Args:
        console: to print on.
        tokens: of the prompt.
        kv_map: of the same tokens.
    """
    has_colours = console.color_system is not None and not console.no_color
    pieces = ((token.text, level_of(bits)) for token, bits in zip(tokens, kv_map.bits, strict=True))
    for line in _lines(pieces, console.width):
        console.print(_coloured(line) if has_colours else _marked(line), soft_wrap=True)
    console.print(_legend(kv_map, has_colours))


def _lines(tokens: Iterable[Piece], width: int) -> Iterator[list[Piece]]:
    """Yield the lines of a prompt, none wider than the console.

    Args:
        tokens: text and level of each.
        width: of the console, in cells.

    Yields:
        The pieces of a line.
    """
    line: list[Piece] = []
    for text, level in tokens:
        *ended, last = text.split("\n")
        for shown, ends in (*((f"{one}{LINE_END}", True) for one in ended), (last, False)):
            for piece in chop_cells(_printable(shown), width):
                while sum(cell_len(before) for before, _ in line) + cell_len(piece) > width:
                    full, line = _broken(line, piece)
                    yield full
                line.append((piece, level))
            if ends:
                yield line
                line = []
    if line:
        yield line


def _broken(line: list[Piece], piece: str) -> tuple[list[Piece], list[Piece]]:
    """Return what stays on a line that a piece does not fit, and what of the piece's word goes on with it."""
    begins = [place for place, (before, _) in enumerate(line) if place and before.startswith(" ")]
    if piece.startswith(" ") or not begins:
        return line, []
    return line[: begins[-1]], line[begins[-1] :]


def _printable(text: str) -> str:
    """Return a text without control characters, which could control the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _style(level: Level) -> Style:
    red, green, blue = (int(level.colour[at : at + 2], 16) for at in (1, 3, 5))
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > LIGHT
    return Style(color="black" if is_light else "white", bgcolor=level.colour)


def _coloured(line: list[Piece]) -> Text:
    return Text.assemble(*((piece, _style(level)) for piece, level in line))


def _marked(line: list[Piece]) -> Text:
    marks = "".join(level.mark * cell_len(piece) for piece, level in line)
    return Text(f"{''.join(piece for piece, _ in line)}\n{marks}")


def _legend(kv_map: KvMap, has_colours: bool) -> Text:
    """Return the levels that there are, each with its mark and how many tokens have it."""
    counted = Counter(level_of(bits) for bits in kv_map.bits)
    legend = Text("\ntokens by bits per element of their keys and values, as a mean over the layers\n")
    for level in LEVELS:
        if level in counted:
            legend.append(f" {level.mark} ", _style(level) if has_colours else "")
            legend.append(f" {level.name}: {counted[level]:,}\n")
    mean = sum(kv_map.bits) / len(kv_map.bits)
    legend.append(f"mean: {mean:.2f} bits")
    return legend
