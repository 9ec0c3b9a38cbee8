"""The Python client: one stream, whatever happens to the routers that carry it.

Owns reconnecting with `resume_from`, at any of the addresses it was given. Does not know workers,
tensors or HTTP.
"""
