"""The pages of a session: pools that are made, kept ahead of use, and, where a step needs more than
is free, grown or emptied to elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apr import _core
from apr.errors import InvalidInput, OutOfPages
from apr.hf.spec import ModelSpec
from apr.ops import Pool
from apr.ops.arena import Arena
from apr.threads.offload import Offload


class Memory:
    """Pools of one number of pages, a layer each. The core's table says who has which page."""

    def __init__(self, spec: ModelSpec, page_size: int, most_pages: int, on_full: str) -> None:
        self._spec, self._page_size, self.most_pages = spec, page_size, most_pages
        self._offloads = on_full == "offload"
        self.pools: list[Pool] = []
        self.offload: Offload | None = None
        self._arena = Arena([])

    def make(self, spec: ModelSpec, pages: int) -> None:
        """Make the pools anew, for a model as it is now; what they held is gone. Where that fails
        there are none, and it can be tried again.
        """
        self.close()
        self._spec = spec
        self.pools = spec.make_pools(pages, self._page_size)
        self._follow()
        self._arena.keep_ahead(0, 0)

    def _follow(self) -> None:
        """Let those who look at the pools look at the ones that there are."""
        self._arena.close()
        self._arena = Arena(self.pools)
        if self._offloads and self.offload is None:
            self.offload = Offload(self.pools)
        elif self.offload is not None:
            self.offload.follow(self.pools)

    def make_room(
        self, core: _core.ThreadTable, threads: Sequence[int], saved: Sequence[int] | None = None
    ) -> bool:
        """Have pages for a step of these threads, as far as that is possible; with segments
        `saved`, for all that a file of both holds. Returns whether pools are others than before.

        Raises OutOfPages where memory for more of them, or for what is away, cannot be had; nothing
        is lost then.
        """
        grown = False
        if core.num_pages < self.most_pages or self._is_torn(core):
            pages, _ = core.needs_of(threads, saved or (), saved is not None)
            if pages > core.free_pages:
                core.make_room(pages)
            grown = self.grow(core, core.num_pages + pages - core.free_pages)
        if self.offload is not None:
            self.offload.make_room(core, threads, saved)
        return grown

    def _is_torn(self, core: _core.ThreadTable) -> bool:
        """Whether growing was interrupted."""
        return any(pool.num_pages != core.num_pages for pool in self.pools)

    def grow(self, core: _core.ThreadTable, pages: int) -> bool:
        """Have so many pages, or the most, or twice as many as before if that is more; nothing is
        done where there are as many. Pools grow one by one, so that one layer is there twice.
        """
        want = max([core.num_pages, *(pool.num_pages for pool in self.pools)])
        if pages > want:
            want = min(max(pages, 2 * want), self.most_pages)
        if want == core.num_pages and not self._is_torn(core):
            return False
        for i, pool in enumerate(self.pools):
            if pool.num_pages < want:
                self.pools[i] = self._larger(i, pool, want)
        core.grow(want)
        self._follow()
        return True

    def _larger(self, layer: int, pool: Pool, pages: int) -> Pool:
        try:
            larger = self._spec.make_pool(layer, pages, self._page_size)
        except (InvalidInput, torch.OutOfMemoryError) as error:
            raise OutOfPages(
                f"the KV pool cannot grow from {pool.num_pages} to {pages} pages of "
                f"{self._page_size} tokens ({error}); release threads, or free memory"
            ) from error
        for name, side in pool.sides.items():
            larger.sides[name][: pool.num_pages].copy_(side)
        return larger

    def keep_ahead(self, core: _core.ThreadTable) -> None:
        """Start touching what will be needed next."""
        self._arena.keep_ahead(core.peak_pages, core.num_threads)

    def settle(self) -> None:
        """Wait until nobody touches the pools' memory."""
        self._arena.wait()

    def close(self) -> None:
        """Let the pools go."""
        self.pools, self.offload = [], None
        self._arena.close()
