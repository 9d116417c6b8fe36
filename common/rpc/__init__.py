"""gRPC for both services: channels, servers, deadlines, statuses, the Decode stream."""
