"""SHA-256 of files while they are read or written, and writing to a store, whose files grow only at their end.

The idea: several threads read or write the tensors of a file, roughly in the order of the file. A digest and a store both
need that order exactly. What comes too early is therefore put aside: for a file on the disk, only where it is, since it is
still in the page cache when its turn comes; for a file in a store, its bytes. A file is so never read a second time from the
disk just for its digest.

How much is put aside is bounded by what the threads have in hand, if they go through a file in its order. The experts of a
copy have another order than those of the model; then it is up to a layer's experts.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable
from functools import partial

from mpunlearn.storage import Place, StorePath, pieces

MOST_HELD = 1 << 28
"""Number of bytes of a file in a store that are put aside for its digest; any more are read a second time."""


class InOrder:
    """Passes on the parts of a file in order, whichever order threads bring them in.

    Args:
        emit: called with each part, by one thread at a time.
        put_aside: called with the start of a part and the part; returns what gives it back.
    """

    def __init__(
        self,
        emit: Callable[[memoryview], object],
        put_aside: Callable[[int, memoryview], Callable[[], Iterable[memoryview]]],
    ) -> None:
        self._emit, self._put_aside = emit, put_aside
        self._lock = threading.Lock()
        self._busy = False
        self._aside: dict[int, tuple[int, Callable[[], Iterable[memoryview]]]] = {}
        self.next = 0
        """Where the next part begins that has not been passed on."""

    def add(self, start: int, part: memoryview) -> None:
        """Passes on a part, and those after it that were put aside; or puts it aside. A part that came before is ignored."""
        with self._lock:
            if not len(part) or start < self.next or start in self._aside:
                return
            if self._busy or start != self.next:
                self._aside[start] = (len(part), self._put_aside(start, part))
                return
            self._busy, self.next = True, start + len(part)
        parts: Iterable[memoryview] = (part,)
        while True:
            for piece in parts:
                self._emit(piece)
            with self._lock:
                if self.next not in self._aside:
                    self._busy = False
                    return
                length, recall = self._aside.pop(self.next)
                self.next += length
            parts = recall()


class FileHasher:
    """SHA-256 of a file on the way.

    Args:
        place: the file.
        size: its size in bytes.
    """

    def __init__(self, place: Place, size: int) -> None:
        self._place, self._size, self._held = place, size, 0
        self._sha256 = hashlib.sha256()
        self._order = InOrder(self._sha256.update, self._put_aside)

    def add(self, start: int, part: memoryview) -> None:
        """Takes note of the bytes of the file from `start` on, which are there to be read again."""
        self._order.add(start, part)

    def hexdigest(self) -> str:
        """The digest of the whole file; reads what has not been noted."""
        for piece in pieces(self._place, self._order.next, self._size):
            self._order.next += len(piece)
            self._sha256.update(piece)
        return self._sha256.hexdigest()

    def _put_aside(self, start: int, part: memoryview) -> Callable[[], Iterable[memoryview]]:
        if isinstance(self._place, StorePath) and self._held + len(part) <= MOST_HELD:
            self._held += len(part)
            return partial(self._give_back, bytes(part))
        return partial(pieces, self._place, start, start + len(part))

    def _give_back(self, part: bytes) -> Iterable[memoryview]:
        self._held -= len(part)
        return (memoryview(part),)
