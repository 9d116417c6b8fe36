"""Codec fixed_rate on GPUs: `encoding` codes a layer before the host waits, `decoding` writes a whole message.

Both look up the same constants (`tables`), multiply tiles of the same sizes (`tiles`), and compute powers, widths and
bits as the host does (`integers`).
"""
