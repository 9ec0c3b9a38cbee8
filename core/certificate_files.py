"""The files of a certificate, read again when one of them changes.

Owns when they are looked at: when a caller asks, at most once a second, so that nothing runs while
nobody needs the content; and its events: new content that cannot be used is reported once, and the
old stays. Does not know the files' format.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from core import events
from core.errors import ServingError

LOOK_S = 1.0
Content = TypeVar("Content")
Stamp = tuple[tuple[int, int, int], ...]


class CertificateFiles(Generic[Content]):
    """The newest usable content of some files. The lock is for gRPC's threads."""

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        read: Callable[[], Content],
        now_s: Callable[[], float],
    ) -> None:
        """Read for the first time.

        Args:
            what: What the files hold, as the subject of a sentence.
            paths: The files, all of which must be there.
            read: Makes the content; raises `OSError` or `ServingError` if it cannot be used.
            now_s: Monotonic seconds.

        Raises:
            OSError: A file is not there, or `read` raised it.
            ServingError: `read` raised it.
        """
        self._what = what
        self._paths = paths
        self._read = read
        self._now_s = now_s
        self._lock = threading.Lock()
        self._looked_at = now_s()
        self._stamp = self._look()
        self._reported: Stamp | None = None
        self.content = read()
        self.version = 0
        """Raised with every new content."""

    def refresh(self) -> int:
        """Take up what has changed; returns the version."""
        with self._lock:
            now_s = self._now_s()
            if now_s - self._looked_at >= LOOK_S:
                self._looked_at = now_s
                self._take_up()
            return self.version

    def _take_up(self) -> None:
        stamp: Stamp = ()  # of files that are gone
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self.content = self._read()
                self._stamp = stamp
                self.version += 1
                events.CERTIFICATE_RENEWED.log(what=self._what)
            self._reported = None
        except (OSError, ServingError) as error:
            # Reported once and tried at every look: what stands in the way may pass by itself, as
            # a lack of descriptors does.
            if stamp != self._reported:
                fact = getattr(error, "strerror", None) or str(error)
                events.CERTIFICATE_UNUSABLE.log(what=self._what, reason=fact)
            self._reported = stamp

    def _look(self) -> Stamp:
        facts = [path.stat() for path in self._paths]
        # With the inode: a file that was renamed into place may have the old time.
        return tuple((f.st_ino, f.st_size, f.st_mtime_ns) for f in facts)
