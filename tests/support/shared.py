"""Children of clusters that outlive a test: who shares one adds here what tells which they are now.

Owns the list.
"""

from collections.abc import Callable

children: list[Callable[[], set[int]]] = []
