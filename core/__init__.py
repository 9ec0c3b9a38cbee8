"""The vocabulary of all rooms: requests, events, errors, config, layouts, ports.

Owns the types that every room uses. Does not know torch, ray, grpc or redis: standard library and
pydantic only.
"""
