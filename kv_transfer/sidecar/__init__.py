"""A process beside the worker for libraries that can hang or crash: gloo, NCCL, NIXL.

Owns that process, its protocol and both ends of its streams. Does not look into KV.
"""
