"""Mutation testing: small random bugs in copies of the tree,
and which tests notice (`make mutants`)."""
