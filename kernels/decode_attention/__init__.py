"""decode_attention."""
