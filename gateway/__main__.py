"""Runs `python -m spectrumkv.gateway`, which is the command `spectrumkv-gateway`."""

from spectrumkv.common.service.entrypoints import gateway

if __name__ == "__main__":
    gateway()
