"""Where what is costly to make is kept between runs: compiled code here, models and probes in `common`."""

import os
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "SPECTRUMKV_CACHE"


def cache_directory() -> Path:
    """The directory named by SPECTRUMKV_CACHE, else the user's cache directory. It need not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("spectrumkv")
