"""The bodies of a message into slots, by one copy and two launches; `decode` makes them.

`unpacking` makes coefficients of records, and `synthesis` makes keys and values of those.
"""
