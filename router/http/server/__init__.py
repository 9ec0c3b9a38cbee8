"""The HTTP server's sockets, below any request: connections, their limits, their bytes.

Owns what happens before a request is routed. Does not know endpoints or models.
"""
