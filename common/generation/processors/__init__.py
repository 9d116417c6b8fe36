"""Logits processors: a small piece for each way in which a request changes what is chosen.

To add one is to add a factory under `@processor`, in a module of its stage or in one of its own.
"""

from spectrumkv.common.generation.processors.base import (
    History,
    Processor,
    Stage,
    make_processors,
    processor,
    processors,
)
from spectrumkv.common.registry import import_modules

import_modules(__name__, __path__)

__all__ = ["History", "Processor", "Stage", "make_processors", "processor", "processors"]
