"""What this machine has."""

import os


def memory_bytes() -> int | None:
    """How much memory there is; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
