"""Who calls and what they may do: API keys, their file, wrong keys, the server's certificate.

Owns credentials and identities. Does not know what a request asks.
"""
