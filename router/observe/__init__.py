"""What the router lets an operator see: metrics, the request log, readiness, the canary.

Owns counts, times and their words. Does not change what happens to a request.
"""
