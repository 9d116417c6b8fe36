"""The commands of `spectrumkv`, a file each: `add_parser` registers one, `run` carries it out."""
