"""The HTTP door: OpenAI's endpoints, vLLM's beside them, and the operator's.

Owns bodies, replies, server-sent events and their errors. Does not know workers or tensors.
"""
