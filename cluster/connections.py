"""The book of connections at the HTTP door: how many may be open, and who makes room for a newcomer.

Owns the limits and the order in which idle connections give way, over plain numbers and addresses.
Does not know sockets or HTTP. Called by `cluster.http_listener` and `cluster.http_protocol`.

A newcomer is never turned away while somebody idles. When the door is full, or an address has its
share, the connection that has been silent the longest is closed for it: first those that never
asked for anything, then those that rest between two requests. Only when every connection is at
work does a newcomer find the reserve, which answers liveness and nothing else.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from router.calls import network_of


class Connection:
    """One open connection. `close` cuts it at once; `is_reserved`: only liveness is answered."""

    __slots__ = ("_book", "address", "close", "is_reserved", "network")

    def __init__(self, book: ConnectionBook, address: str, *, is_reserved: bool) -> None:
        """It has asked for nothing yet."""
        self._book = book
        self.address = address
        self.network = network_of(address)
        self.is_reserved = is_reserved
        self.close: Callable[[], None] = lambda: None

    def work(self) -> None:
        """A whole request head has come: the connection no longer makes room for others."""
        self._book.silent.pop(self, None)
        self._book.resting.pop(self, None)

    def rest(self) -> None:
        """Everything asked for was answered."""
        self._book.resting[self] = None

    def forget(self) -> None:
        """It is closed; may be said more than once."""
        self._book.forget(self)


class ConnectionBook:
    """Who is connected."""

    def __init__(self, limit: int, limit_per_address: int, num_reserved: int) -> None:
        """Start empty.

        Args:
            limit: Connections that are served.
            limit_per_address: Those of one IPv4 address, or of one /64 of IPv6.
            num_reserved: Further ones, over all addresses, that are answered liveness alone.
        """
        self._limit = limit
        self._limit_per_address = limit_per_address
        self._num_reserved = num_reserved
        self._all: set[Connection] = set()
        self._by_network: Counter[str] = Counter()
        self.silent: OrderedDict[Connection, None] = OrderedDict()
        self.resting: OrderedDict[Connection, None] = OrderedDict()
        self.num_displaced = 0
        self.num_refused = 0

    def __len__(self) -> int:
        """Connections that are open, the reserve included."""
        return len(self._all)

    def of_address(self, address: str) -> int:
        """Connections of one address."""
        return self._by_network[network_of(address)]

    def admit(self, address: str) -> Connection | None:
        """Take a newcomer in, at somebody's expense if need be.

        Returns:
            Its entry; None if even the reserve is full, which leaves the book as it was.
        """
        network = network_of(address)
        is_full = (
            self._by_network[network] >= self._limit_per_address and not self.displace(network)
        ) or (len(self._all) >= self._limit and not self.displace())
        if is_full and len(self._all) >= self._limit + self._num_reserved:
            self.num_refused += 1
            return None
        connection = Connection(self, address, is_reserved=is_full)
        self._all.add(connection)
        self._by_network[network] += 1
        self.silent[connection] = None
        return connection

    def displace(self, network: str | None = None) -> bool:
        """Close whoever has idled longest (of one network); False if nobody idles."""
        for idle in (self.silent, self.resting):
            for connection in idle:
                if network in (None, connection.network):
                    self.num_displaced += 1
                    self.forget(connection)
                    connection.close()
                    return True
        return False

    def forget(self, connection: Connection) -> None:
        """Take a connection out; nothing happens if it is not in."""
        if connection not in self._all:
            return
        self._all.remove(connection)
        self.silent.pop(connection, None)
        self.resting.pop(connection, None)
        self._by_network[connection.network] -= 1
        if not self._by_network[connection.network]:
            del self._by_network[connection.network]
