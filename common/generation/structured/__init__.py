"""Holds an answer to a form, such as a JSON schema: which tokens may come next."""
