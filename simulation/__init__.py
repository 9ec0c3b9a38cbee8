"""The same cluster on virtual time: one thread, one seed, every fault at will.

Owns the virtual loop, the in-memory network and the simulated nodes. Does not know torch, Ray or
sockets.
"""
