"""The router: doors, tokenizing, admission, placement, the orchestrator, detokenizing.

Owns a request from its first byte to its one ending. Does not know torch or Ray; text exists here
alone.
"""
