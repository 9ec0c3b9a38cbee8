"""What the advisory store holds of the workers: a mirror of the members, and the prefix index.

Owns what is written there, when, and what a router makes of it. No request awaits it, and without
it the cluster runs. Does not know torch, models or the Redis client.
"""
