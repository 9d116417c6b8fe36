"""Collect what a stage finds, and write its file after every part, so that a stage that is ended keeps its parts."""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spectrumkv.bench.device.scale import FULL, TINY, Scale
from spectrumkv.bench.report.results import describe_speed_run, load_average
from spectrumkv.client.cli.output import write_json

PASSED, FAILED, INCOMPLETE = 0, 1, 3


def result_path(folder: Path, stage: str, device_name: str) -> Path:
    """Return the file of a stage's rows, such as "device-codec-h200.json"; pictures have the same name.

    Args:
        folder: of the results.
        stage: name of the stage.
        device_name: as CUDA tells it, such as "NVIDIA H200", or "cpu".
    """
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return folder / f"device-{stage}-{'-'.join(word for word in words if word != 'nvidia')}.json"


@dataclass(frozen=True)
class StageSettings:
    """Hold what the process of a stage is told.

    Attributes:
        stage: name of the stage.
        path: its result file.
        tiny: whether it runs at the scale `TINY`.
        seconds: how long it may take.
    """

    stage: str
    path: str
    tiny: bool
    seconds: float

    @property
    def scale(self) -> Scale:
        """Return the sizes of the stage."""
        return TINY if self.tiny else FULL

    def to_json(self) -> str:
        """Return the settings as the stage's process reads them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "StageSettings":
        """Return the settings that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass
class StageReport:
    """Collect a stage's rows, and what went wrong.

    Attributes:
        settings: of the stage.
        rows: so far.
        failures: what is wrong with the project; any makes the stage fail.
        not_run: parts for which there was no time; any makes the stage incomplete.
        notes: what a reader of the rows must know, such as what the machine does not have.
        model: see `describe_model`; None if no model took part.
    """

    settings: StageSettings
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + self.settings.seconds
        self._load_before = load_average()

    @property
    def seconds_left(self) -> float:
        """Return how long the stage may still take."""
        return self._ends - time.monotonic()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows and write the file.

        Raises:
            InvalidArgumentError: the file cannot be written.
        """
        self.rows += [dict(one) for one in rows]
        self._write(complete=False)

    def finish(self) -> int:
        """Write the file for the last time.

        Returns:
            The exit status of the stage's process.

        Raises:
            InvalidArgumentError: the file cannot be written.
        """
        self._write(complete=True)
        return FAILED if self.failures else INCOMPLETE if self.not_run else PASSED

    def _write(self, complete: bool) -> None:
        scale = self.settings.scale
        arguments = argparse.Namespace(**asdict(self.settings), scale=asdict(scale))
        meta = describe_speed_run(arguments, self.model, self._load_before) | {
            "stage": self.settings.stage,
            "device": scale.device,
            "measurement": not scale.caveat,
            "caveat": scale.caveat or None,
            "complete": complete,
            "failures": self.failures,
            "not_run": self.not_run,
            "notes": self.notes,
        }
        write_json({"meta": meta, "rows": self.rows}, self.settings.path)
