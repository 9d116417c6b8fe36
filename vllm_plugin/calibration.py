"""Finds a model's basis, in a process of its own: `python -m spectrumkv.vllm_plugin.calibration MODEL FILE`."""

import sys
from pathlib import Path

from spectrumkv.common.model.load import load_model
from spectrumkv.prefill_server.tuning.basis_cache import default_excerpts
from spectrumkv.prefill_server.tuning.calibration import calibrate


def main() -> None:
    """Write the basis of the model that the command line names into the file that it names."""
    name, file = sys.argv[1:]
    loaded = load_model(name, "cpu", packed=False)
    Path(file).write_bytes(calibrate(loaded, default_excerpts(loaded), lambda done: None).serialized)


if __name__ == "__main__":
    main()
