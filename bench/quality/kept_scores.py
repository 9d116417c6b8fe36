"""Keep the scores of windows in a file while `quality` measures, so that a run that was cut goes on where it ended.

Methods that are added later are measured on the same windows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrumkv import decode_server, kernels
from spectrumkv.bench.methods.method import MethodName
from spectrumkv.bench.quality.scoring import WindowScore
from spectrumkv.bench.report.kept_outcomes import KeptOutcomes, Key, modules_digest
from spectrumkv.common import kv, model
from spectrumkv.common.rpc import decode_stream
from spectrumkv.prefill_server import engine, transfer, tuning, verdict

# What the services would send, the framing that is counted with it, and how predictions over it are compared, is in
# these. Others, such as those of connections, change more often, and no score changes with them.
MEASURED_MODULES = (kv, model, kernels, engine, transfer, tuning, verdict, decode_server, decode_stream)
ALLOWED = "a file that {} wrote with the same text, windows, model, versions and sources, or a new one"


class KeptScores:
    """Hold the scores that are known; those of a file stay there when the process ends."""

    def __init__(
        self,
        path: Path | None = None,
        circumstances: Mapping[str, Any] | None = None,
        command: str = "quality",
    ) -> None:
        """Read the file, or begin it.

        Args:
            path: the file; None to keep scores in memory only.
            circumstances: what all scores of the file have in common, as JSON can express it.
            command: that writes such files.

        Raises:
            InvalidArgumentError: the file cannot be read or written, or has scores of other circumstances.
        """
        self._scores = KeptOutcomes(WindowScore, ALLOWED.format(command), path, circumstances)

    def has(self, window: int, method: MethodName) -> bool:
        """Return whether the score of a method on a window is known."""
        return _key(window, method) in self._scores

    def get(self, window: int, method: MethodName) -> WindowScore:
        """Return the score of a method on a window, which is known."""
        return self._scores[_key(window, method)]

    def add(self, window: int, method: MethodName, score: WindowScore) -> None:
        """Add the score of a method on a window.

        Raises:
            InvalidArgumentError: the file cannot be written.
        """
        self._scores.keep(_key(window, method), score)


def sources_digest() -> str:
    """Return the SHA-256 of the sources of `MEASURED_MODULES`, which tells apart two states of the code."""
    return modules_digest(MEASURED_MODULES)


def _key(window: int, method: MethodName) -> Key:
    return window, method.policy, method.codec, method.scorer, method.scope, method.budget
