"""What quality benches compare: policies as they are served, and how a run selects them."""
