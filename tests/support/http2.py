"""Raw HTTP/2 frames: just enough of a client to misbehave.

Owns the bytes of SETTINGS, HEADERS, DATA, PING and RST_STREAM.
"""

import socket
import struct

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4
MAX_CONCURRENT_STREAMS = 3
CANCEL = struct.pack(">I", 8)


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def block(headers):
    """A header block of literals, without Huffman code or table."""
    out = b""
    for name, value in headers:
        name, value = name.encode(), value.encode()
        assert len(name) < 127 and len(value) < 127
        out += bytes([0, len(name)]) + name + bytes([len(value)]) + value
    return out


def call_head(path):
    return block(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "x"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
    )


class RawClient:
    """One connection; `settings` is what the server announced."""

    def __init__(self, port, timeout_s=2.0):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))
        self.settings, self.next_stream, self._rest = {}, 1, b""
        while not self.settings:
            for kind, flags, _, payload in self.read():
                if kind == SETTINGS and not flags & ACK:
                    pairs = (payload[i : i + 6] for i in range(0, len(payload), 6))
                    self.settings = dict(struct.unpack(">HI", pair) for pair in pairs)
        self.socket.sendall(frame(SETTINGS, ACK, 0))

    def read(self):
        """Frames that have come; raises ConnectionError at the end of the connection."""
        piece = self.socket.recv(1 << 16)
        if not piece:
            raise ConnectionError("the server closed")
        self._rest += piece
        while len(self._rest) >= 9:
            size = int.from_bytes(self._rest[:3], "big")
            if len(self._rest) < 9 + size:
                return
            kind, flags, stream = struct.unpack(">BBI", self._rest[3:9])
            payload, self._rest = self._rest[9 : 9 + size], self._rest[9 + size :]
            yield kind, flags, stream, payload

    def call(self, path, message=b""):
        """Bytes that open a call, whose stream id is `next_stream` before."""
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        out = frame(HEADERS, END_HEADERS, stream, call_head(path))
        return out + (frame(DATA, 0, stream, message) if message else b"")
