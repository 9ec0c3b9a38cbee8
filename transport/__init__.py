"""Streams of messages between Baton's processes, whatever the messages mean.

Owns gRPC streams of raw bytes, their numbering, the session's encoding, TLS and proof of identity.
Does not know models, requests or KV.
"""
