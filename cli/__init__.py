"""The `baton` commands that people type, each a module.

Owns options, what the terminal shows, and exit codes. Does not know how a cluster works inside: it
starts one through `cluster` and talks to its public servers.
"""
