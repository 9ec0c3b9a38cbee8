"""The Python client: one stream, whatever happens to the routers behind it.

Owns reconnecting with `resume_from`, at any of its addresses. Does not know workers,
tensors or HTTP.
"""
