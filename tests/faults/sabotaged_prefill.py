"""Runs a prefill service that can be broken from inside (see `sabotage`), in the place of its own module."""

import os
from pathlib import Path

from spectrumkv.common.service.entrypoints import prefill
from tests.faults import sabotage

if __name__ == "__main__":
    sabotage.install(Path(os.environ["SABOTAGE_SWITCH"]))
    prefill()
