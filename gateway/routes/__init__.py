"""Serve the routes, a module for each kind."""

from spectrumkv.gateway.routes import completions, models, operations, tokens

ROUTERS = (completions.router, models.router, tokens.router, operations.router)
