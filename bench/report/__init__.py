"""Results: tables, plots, goals, where a run took place."""
