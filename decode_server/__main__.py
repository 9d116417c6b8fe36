"""Runs `python -m spectrumkv.decode_server`, which is the command `spectrumkv-decode`."""

from spectrumkv.common.service.entrypoints import decode

if __name__ == "__main__":
    decode()
