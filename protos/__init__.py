"""Wire contracts: `baton/v1` is public, `baton/internal/v1` is spoken between our own processes.

Owns the .proto files and the code generated from them (`make protos`; CI checks for drift). Does
not know who speaks them.
"""
