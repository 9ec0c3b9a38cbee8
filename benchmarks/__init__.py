"""Measurements. Each script prints a table and writes raw JSON under `benchmarks/results/`.

Owns no product code. Does not assert: behaviour is tested, speed is recorded. Called by hand.
"""
