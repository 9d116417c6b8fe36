"""The `spectrumkv` command, a file for each of its commands."""
