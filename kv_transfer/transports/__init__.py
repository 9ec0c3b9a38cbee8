"""The transports by name, and which one a pair of workers takes.

Owns that choice, and shared memory between the processes of one host. Does not know the
transfer's states.
"""
