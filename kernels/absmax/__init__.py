"""absmax."""
