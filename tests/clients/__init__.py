"""Clients and tools that others made, from an environment of their own, against a real pair behind the gateway.

`make test-clients` makes the environment and runs this folder; `make test` leaves it out.
"""
