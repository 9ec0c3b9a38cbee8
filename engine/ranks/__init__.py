"""Rank processes: what starts, feeds, watches and joins them.

Owns the pipe, shared memory and collectives of one group. Does not know the network or requests.
"""
