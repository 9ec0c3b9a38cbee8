"""What the router shows an operator: metrics, the request log, readiness, the cluster's status.

Owns counts, times and their words. Does not change what happens to a request.
"""
