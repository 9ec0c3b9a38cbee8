"""Config to running cluster: composition over Ray Serve or child processes, and the `baton` CLI.

Owns the wiring of real parts: gRPC, processes, Ray, Redis, telemetry. Does not know kernels. It is
the only package that imports Ray.
"""
