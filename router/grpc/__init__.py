"""The gRPC door: `baton.v1.Generation`, health and reflection.

Owns its server, limits and credentials. Does not know HTTP or workers.
"""
