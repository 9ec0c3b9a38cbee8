"""The router: HTTP and gRPC servers, text, admission, placement, the orchestrator.

Owns a request from its first byte to its one ending. Does not know torch or Ray; text exists only
here.
"""
