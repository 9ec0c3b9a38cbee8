"""The gRPC server: `baton.v1.Generation`, health and reflection.

Owns the server, its limits and credentials. Does not know HTTP or workers.
"""
