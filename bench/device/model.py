"""Stage `model`: write the model that the next stages serve, once for all runs on a machine."""

import time

from spectrumkv.bench.device.report import StageReport
from spectrumkv.bench.models.shaped_model import shaped_model_directory


def run(report: StageReport) -> None:
    """Write the model where it is missing, and report how long that took.

    Raises:
        FailedPreconditionError: the cache directory cannot be written to.
    """
    started = time.monotonic()
    directory = shaped_model_directory(report.settings.scale.shape)
    size = sum(file.stat().st_size for file in directory.iterdir())
    report.add([{"shape": report.settings.scale.shape, "bytes": size, "seconds": time.monotonic() - started}])
