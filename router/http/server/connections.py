"""The table of HTTP connections: how many may be open, and which one makes room.

Owns the limits and the order in which idle connections are closed, over plain numbers and
addresses. Does not know sockets or HTTP.

A new connection is never refused while another is idle. When the table is full, or an address has
its share, the connection that has been idle longest is closed for it: first those that never sent a
request, then those between two requests. Only when every connection is busy does a new one get a
place in the reserve, which answers liveness and nothing else.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from router.calls import network_of


class Connection:
    """One open connection. `close` cuts it at once; if `is_reserved`, it answers only liveness."""

    __slots__ = ("_table", "address", "close", "is_reserved", "network")

    def __init__(
        self,
        table: ConnectionTable,
        address: str,
        close: Callable[[], object],
        *,
        is_reserved: bool,
    ) -> None:
        self._table = table
        self.address = address
        self.network = network_of(address)
        self.is_reserved = is_reserved
        self.close = close

    def mark_busy(self) -> None:
        """Note a whole request head: the connection no longer makes room for others."""
        self._table.mark_busy(self)

    def mark_idle(self) -> None:
        """Note that every request has been answered."""
        self._table.mark_idle(self)

    def forget(self) -> None:
        """Remove the closed connection from the table; calling this again is harmless."""
        self._table.forget(self)


class ConnectionTable:
    """The open connections."""

    def __init__(self, limit: int, limit_per_address: int, num_reserved: int) -> None:
        """Start empty.

        Args:
            limit: Most connections that are served.
            limit_per_address: Most of one IPv4 address, or of one /64 of IPv6.
            num_reserved: Further connections, over all addresses, which get only liveness.
        """
        self._limit = limit
        self._limit_per_address = limit_per_address
        self._num_reserved = num_reserved
        self._all: set[Connection] = set()
        self._by_network: Counter[str] = Counter()
        self._silent: OrderedDict[Connection, None] = OrderedDict()
        self._idle: OrderedDict[Connection, None] = OrderedDict()
        self.num_displaced = 0

    def __len__(self) -> int:
        """Count open connections, the reserve included."""
        return len(self._all)

    def of_address(self, address: str) -> int:
        """Count the connections of one address."""
        return self._by_network[network_of(address)]

    def admit(self, address: str, close: Callable[[], object]) -> Connection | None:
        """Add a new connection, which `close` cuts; close an idle one for it if necessary.

        Returns:
            The connection; None if even the reserve is full.
        """
        # The address first: a flood of one host closes its own idle connections, not others'.
        network = network_of(address)
        is_full = (
            self._by_network[network] >= self._limit_per_address and not self.displace(network)
        ) or (len(self._all) >= self._limit and not self.displace())
        if is_full and len(self._all) >= self._limit + self._num_reserved:
            return None
        connection = Connection(self, address, close, is_reserved=is_full)
        self._all.add(connection)
        self._by_network[network] += 1
        # Until its first request; from then on it is busy or idle.
        self._silent[connection] = None
        return connection

    def mark_busy(self, connection: Connection) -> None:
        """Note that the connection has a request."""
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)

    def mark_idle(self, connection: Connection) -> None:
        """Note that the connection is between two requests."""
        self._idle[connection] = None

    def displace(self, network: str | None = None) -> bool:
        """Close the connection that has been idle longest (of one network); False: none is idle."""
        # One that never asked loses less than a client between two requests.
        for candidates in (self._silent, self._idle):
            for connection in candidates:
                if network in (None, connection.network):
                    self.num_displaced += 1
                    # Forgotten first: its place is free at once, however long closing takes.
                    self.forget(connection)
                    connection.close()
                    return True
        return False

    def forget(self, connection: Connection) -> None:
        """Remove a connection, if it is still there."""
        if connection not in self._all:
            return
        self._all.remove(connection)
        self.mark_busy(connection)
        self._by_network[connection.network] -= 1
        if not self._by_network[connection.network]:
            del self._by_network[connection.network]
