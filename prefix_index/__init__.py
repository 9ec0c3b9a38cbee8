"""What Redis holds for the cluster: a mirror of the members, and the prefix index.

Owns every use of Redis. The store is advisory: no request ever awaits it, every call is bounded to
50 ms, and without it the cluster runs. Does not know torch or models.
"""
