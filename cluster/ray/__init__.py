"""The cluster on Ray: one Serve application, ranks as actors, Ray's own surface.

Owns everything that imports Ray. Does not know kernels or the wire.
"""
