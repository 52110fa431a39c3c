"""The gRPC contract in Python: generated stubs, channels, servers, authentication."""
