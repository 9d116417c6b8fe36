"""Make models, caches and bases for benches."""
