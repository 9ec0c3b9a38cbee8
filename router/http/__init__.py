"""The HTTP server: OpenAI's endpoints, some of vLLM's, and the operator's.

Owns bodies, replies, server-sent events and their errors. Does not know workers or tensors.
"""
