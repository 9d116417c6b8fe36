"""Runs `python -m spectrumkv.prefill_server`, which is the command `spectrumkv-prefill`."""

from spectrumkv.common.service.entrypoints import prefill

if __name__ == "__main__":
    prefill()
