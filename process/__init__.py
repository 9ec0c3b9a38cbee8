"""Processes of one machine: memory they share, and their end when their parent ends.

Owns memfd segments, parent-death signals, the reaper of orphans, the folder for compiled kernels.
Does not know models, requests or the network.
"""
