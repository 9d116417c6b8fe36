"""Loading models, describing them, and reading their attention."""
