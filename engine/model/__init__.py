"""One transformer over a paged KV cache: weights, layers, attention, sampling.

Owns everything that a rank computes. Does not know other processes.
"""
