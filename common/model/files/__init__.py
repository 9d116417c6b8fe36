"""Finds the files of a model, and refuses damage in them before a library reads them."""
