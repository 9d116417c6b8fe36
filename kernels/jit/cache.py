"""Where what is costly to make is kept between runs: compiled code here, models and probes in `common`.

This module imports no numba, so that commands which compile nothing can ask for the directory.
"""

import hashlib
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "SPECTRUMKV_CACHE"
# Debian's name for the home of users that have none: nothing can be kept there.
NO_HOME = Path("/nonexistent")
# Code that no process has used for so long belongs to another release.
KEPT_SECONDS = 30 * 86400.0
_DIGEST = re.compile("[0-9a-f]{16}")


def cache_directory() -> Path:
    """Return the directory named by SPECTRUMKV_CACHE, else the user's cache directory. It need not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    try:
        return platformdirs.user_cache_path("spectrumkv")
    except RuntimeError:
        # This user has no home, as in many containers. A directory that all users may write to would not do: what is
        # kept is code.
        return NO_HOME / ".cache" / "spectrumkv"


def compiled_code_directory(parent: str) -> Path | None:
    """Make the directory for code that is compiled from the kernels' files as they are now.

    numba notices a change of the file that a function is in, and none of the files whose functions it calls. So the
    directory is named by what all files say. Directories of other releases that nobody uses any more are removed.

    Args:
        parent: directory that is to hold it; empty is `compiled` in `cache_directory`.

    Returns:
        The directory, or None where nothing can be written.
    """
    every = Path(parent) if parent else cache_directory() / "compiled"
    own = every / _digest_of_sources()
    try:
        own.mkdir(parents=True, exist_ok=True)
        os.utime(own)
    except OSError:
        return None
    if not os.access(own, os.W_OK):
        return None
    # Another process may be quicker, and the directory above may be somebody else's.
    others: list[Path] = []
    with suppress(OSError):
        others = list(every.iterdir())
    for other in others:
        with suppress(OSError):
            if _DIGEST.fullmatch(other.name) and time.time() - other.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    return own


def _digest_of_sources() -> str:
    """Return a name for what the files of all kernels say."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
