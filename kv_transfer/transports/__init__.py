"""The transports by name, and which one a pair of workers takes.

Owns that choice and shared memory between hosts' processes. Does not know the transfer's states.
"""
