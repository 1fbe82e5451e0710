"""Keeps the memory of a session's KV pages ahead of use, so that no decode step waits for a first
touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Thread

from apr.ops.pools import Pool

# Pages that are kept present beyond those in use: two a thread, and at least so many, or as many as
# this memory holds if that is fewer.
_AHEAD_PAGES = 64
_AHEAD_BYTES = 256 << 20


class Arena:
    """The pools of a session, whose pages are handed out in order when they are used for the first
    time.

    The operating system gives memory at its first touch, which costs far more than writing the keys
    and values of a token. A background thread touches pages before they are handed out, and ends:
    one that waited for more work could be left waiting by an interrupt as it is started, and then
    the interpreter would not end. It is a convenience: where no thread can be had, pages are
    touched when they are used.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = [pool for pool in pools if pool.k.device.type == "cpu"]
        page_bytes = sum(pool.bytes_per_token * pool.page_size for pool in self._pools)
        self._least = max(1, min(_AHEAD_PAGES, _AHEAD_BYTES // max(page_bytes, 1)))
        self._present = 0
        self._last: Thread | None = None

    def keep_ahead(self, used: int, threads: int) -> None:
        """Start touching what `threads` threads will need next, where pages [0, used) were handed
        out.
        """
        ahead = max(self._least, 2 * threads)
        if not self._pools or self._present - used >= ahead // 2:
            return
        if self._last is not None and self._last.is_alive():
            return  # the next call catches up
        first, end = max(self._present, used), min(used + ahead, self._pools[0].num_pages)
        if first >= end:
            return
        toucher = Thread(target=self._populate, args=(first, end), name="apr-pages")
        try:
            toucher.start()
        except RuntimeError:  # the interpreter is ending, or the system has no thread left
            self._pools = []
            return
        self._last, self._present = toucher, end

    def _populate(self, first: int, end: int) -> None:
        for pool in list(self._pools):
            pool.populate(first, end)

    def follow(self, pools: Sequence[Pool]) -> None:
        """Take others in the place of the pools; waits for what is being touched."""
        self._pools = []
        self.wait()
        self._present = 0
        self._pools = [pool for pool in pools if pool.k.device.type == "cpu"]

    def wait(self) -> None:
        """Until what was started is present, unless an interrupt comes between."""
        if self._last is not None:
            self._last.join()

    def close(self) -> None:
        """Let the pools go; waits for what is being touched."""
        self._pools = []
        self.wait()
