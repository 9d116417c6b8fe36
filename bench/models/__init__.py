"""Models and bases made for benches."""
