"""Children of clusters that outlive a test: who shares one adds here what tells which they are now.

Owns the list. Called by the fixtures that share a cluster and by the check that nothing is left.
"""

from collections.abc import Callable

children: list[Callable[[], set[int]]] = []
