"""The vocabulary of the house: requests, events, errors, config, layouts, ports.

Owns the words every room speaks. Does not know torch, ray, grpc or redis: standard library and
pydantic only.
"""
