"""Run one stage of a device check: `stage.run_stages` starts this module as a process."""

import importlib
import sys

from spectrumkv.bench.device.report import StageReport, StageSettings
from spectrumkv.client.cli.runner import EXIT_INTERRUPTED, status_and_message
from spectrumkv.client.local.running_pair import stopped_by_signals
from spectrumkv.common.errors import SpectrumKVError

# Modules with a function `run`. Only the one that is needed is imported: libraries take seconds to load, and pytest
# warns of those that it finds loaded.
MODULES = {
    "kernels": "spectrumkv.bench.device.kernels",
    "codec": "spectrumkv.bench.device.codec_copy",
    "model": "spectrumkv.bench.device.model",
    "timeline": "spectrumkv.bench.device.timeline.stage",
    "streams": "spectrumkv.bench.device.streams",
}


def main() -> int:
    """Return the exit status of the stage that the first argument describes; see `StageReport.finish`."""
    report = StageReport(StageSettings.from_json(sys.argv[1]))
    try:
        # The end of a stage's time comes as SIGTERM, and must not leave a service or a daemon behind.
        with stopped_by_signals():
            importlib.import_module(MODULES[report.settings.stage]).run(report)
    except SpectrumKVError as error:
        report.failures.append(status_and_message(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        report.failures.append(f"{type(error).__name__}: {error}")
        report.finish()
        raise
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
