"""What every service process does: configuration, options, start checks, signals, exit."""
