"""Quotas: requests and tokens a minute of an API key, counted once over all routers.

Owns what is charged and refunded, and who is refused. Does not know tiers, HTTP, gRPC or Redis.
"""
