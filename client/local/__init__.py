"""Starting a pair of services on this machine."""
