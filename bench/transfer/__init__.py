"""Speed of the transfer between two processes, beside raw TCP and raw gRPC."""
