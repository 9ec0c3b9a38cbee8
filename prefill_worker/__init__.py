"""The prefill role: compute prompts, publish KV layers as they finish, hold blocks until Ack.

Owns what a prefill worker does at Submit and when it sends. Does not know decode workers' insides,
Ray or HTTP.
"""
