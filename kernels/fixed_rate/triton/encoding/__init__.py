"""A layer's states to the bodies of its segments, by three launches; `encode` makes them.

`analysis` makes coefficients. `statistics` finds gains, standard deviations, the order of rows, the base and where
records start, with `scales`, `planning` and `base_search`; what needs all programs' results is done by the program
that finishes last. `packing` writes records, along the paths that `trellis` finds, and the program that finishes a
segment last its escapes. Every sum has one order and nothing is placed by who comes first, so that the same layer
makes the same bytes. `segments` says where parts of bodies lie, and `memory` what the launches leave each other and
the host.
"""
