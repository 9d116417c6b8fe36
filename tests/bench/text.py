"""A text that is long enough for a few small windows."""

from importlib.resources import files

TEXT = (files("spectrumkv.common.needle") / "haystack.txt").read_text(encoding="utf-8")[:6000]
