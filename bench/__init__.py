"""`baton bench`: load on a server, on a router alone, KV between two processes.

Owns schedules of requests, their measurement and the reports. Does not know the inside of the
server that it measures; the transfer benchmark uses the transports through their port, and the
router benchmark has workers without an engine.
"""
