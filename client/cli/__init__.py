"""Run the `spectrumkv` command; each of its commands is a file."""
