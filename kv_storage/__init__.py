"""Blocks of KV outside the pool: in host memory, on a disk.

Owns their bytes and files, and the proof that what is read is what was written. Does not know which
blocks are kept, nor for whom: `engine.scheduling.storage_tiers` decides that.
"""
