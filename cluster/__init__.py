"""Config to running cluster: composition over Ray Serve or child processes.

Owns the wiring of real components: gRPC, processes, Ray, Redis, telemetry. Does not know kernels.
It is the only package that imports Ray.
"""
