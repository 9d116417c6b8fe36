"""gRPC for both services: channels, servers, deadlines, statuses, and the Decode stream with its protocol."""
