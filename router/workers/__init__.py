"""The router's sessions with workers: one for each live worker, and what they offer.

Owns dialling, redialling and what placement may know of a worker. Does not know HTTP, gRPC calls or
text.
"""
