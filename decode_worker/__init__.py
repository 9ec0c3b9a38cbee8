"""The decode role: reserve, receive, verify, attach, then continuous batching.

Owns what a decode worker does at Submit and when it reserves. Does not know prefill workers'
insides, Ray or HTTP.
"""
