"""Where a bench writes its results: looked at before anything is measured, since a run can take hours."""

import argparse
import os
import stat
from pathlib import Path

from spectrumkv.bench import plots
from spectrumkv.client.json_output import STDOUT
from spectrumkv.common.errors import InvalidArgumentError

PLOT_FLAGS = ("plot", "timeline")


def check_destinations(arguments: argparse.Namespace) -> None:
    """Refuse results that could not be written, before hours are spent on them. Nothing is made or changed.

    Args:
        arguments: of any bench; of `--json`, `--plot` and `--timeline` those are looked at that it has.

    Raises:
        InvalidArgumentError: a name is empty, a plot's format is not known, a folder does not exist, or a file
            cannot be written.
        FailedPreconditionError: a plot is asked for and matplotlib is not installed.
    """
    json_file: str | None = getattr(arguments, "json", None)
    if json_file is not None and json_file != STDOUT:
        _check_file("--json", json_file, f"name a file, or {STDOUT!r} for standard output")
    for name in PLOT_FLAGS:
        plot: str | None = getattr(arguments, name, None)
        if plot is not None:
            _check_file(f"--{name}", plot, f"name a file that ends in one of {', '.join(plots.FORMATS)}")
            plots.check_format(f"--{name}", plot)


def _check_file(flag: str, name: str, allowed: str) -> None:
    if not name:
        raise InvalidArgumentError(f"{flag} is empty; {allowed}")
    # Whoever writes leaves slashes at the end away, too.
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        _check_folder(flag, name)
        return
    except OSError as error:
        raise InvalidArgumentError(f"{flag} {name}: {error.strerror}; name a file that can be written") from error
    if stat.S_ISDIR(mode):
        raise InvalidArgumentError(f"{flag} {name} is a folder; {allowed}")
    if not os.access(path, os.W_OK):
        raise InvalidArgumentError(f"{flag} {name} may not be written; name another file")


def _check_folder(flag: str, name: str) -> None:
    """Check the folder of a file that does not exist yet; of a link to such a file, the folder that it points to."""
    folder = Path(os.path.realpath(name)).parent
    if not folder.is_dir():
        raise InvalidArgumentError(f"{flag} {name}: its folder does not exist; make {folder}, or name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"{flag} {name}: its folder {folder} may not be written; name another file")
