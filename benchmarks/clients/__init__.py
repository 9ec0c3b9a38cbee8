"""Other people's clients, as published, against a running cluster.

Owns their pinned versions and the calls that their users make. Called as
`python -m benchmarks.clients`.
"""
