"""How much attention each token gets from a few queries: a plain reference and CPU loops."""
