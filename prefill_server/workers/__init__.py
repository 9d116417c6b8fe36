"""Decode workers as prefill sees them: pool, worker, lease, upload of the basis."""
