"""Serve the routes, a module for each kind."""

from spectrumkv.gateway.routes import completions, models, operations, page, tokens, workers

ROUTERS = (completions.router, models.router, tokens.router, operations.router, workers.router, page.router)
