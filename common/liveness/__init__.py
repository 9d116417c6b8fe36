"""Says whether a service still works, and ends a process that hangs."""
