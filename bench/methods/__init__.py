"""Select and run the methods that benches compare: policies as they are served, and baselines."""
