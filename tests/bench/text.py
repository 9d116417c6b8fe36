"""A text that is long enough for a few small windows."""

from importlib.resources import files

TEXT = (files("spectrumkv.prefill_server.tuning.needle") / "haystack.txt").read_text(encoding="utf-8")[:6000]
