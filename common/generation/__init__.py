"""How tokens are chosen and become text."""
