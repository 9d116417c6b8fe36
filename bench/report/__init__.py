"""Show and write results, draw them, and compare them with the goals."""
