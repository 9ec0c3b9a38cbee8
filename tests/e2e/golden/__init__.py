"""A package, so that its files share a cluster of each kind, which ends with the last of them."""
