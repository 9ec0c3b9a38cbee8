"""A worker: one asyncio process with sessions, a scheduler and a step loop.

Owns all that is the same for both roles. Does not know which role it plays, nor Ray, HTTP or text.
Imports no torch: ranks compute, the worker plans.
"""
