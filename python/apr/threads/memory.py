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
    """A pool for each layer. The core's table says who has which page, of as many as all have."""

    def __init__(self, page_size: int, most_pages: int, on_full: str) -> None:
        self._page_size, self.most_pages = page_size, most_pages
        self._offloads = on_full == "offload"
        self.spec: ModelSpec | None = None  # that the pools were made for
        self.pools: list[Pool] = []
        self.offload: Offload | None = None
        self.arena = Arena([])
        self.grown = 0  # another number: pools lie elsewhere than before

    def make(self, spec: ModelSpec, pages: int) -> None:
        """Make the pools anew; what they held is gone. Where that fails there are none, and it can
        be tried again.
        """
        self.close()
        pools = spec.make_pools(pages, self._page_size)
        self.offload = Offload(pools) if self._offloads else None
        self.arena = Arena(pools)
        self.arena.keep_ahead(0, 0)
        self.grown += 1
        self.spec, self.pools = spec, pools

    def make_room(self, core: _core.ThreadTable, threads: Sequence[int]) -> None:
        """Have pages for a step of these threads, as far as that is possible.

        Raises OutOfPages where memory for more of them, or for what is away, cannot be had; nothing
        is lost then.
        """
        if core.num_pages < self.most_pages:
            pages, _ = core.needs_of(threads, (), False)
            if pages > core.free_pages:
                core.make_room(pages)
            lacking = pages - core.free_pages
            if lacking > 0:
                self._grow_for(core, core.num_pages + lacking)
        if self.offload is not None:
            self.offload.make_room(core, threads)

    def _grow_for(self, core: _core.ThreadTable, pages: int) -> None:
        """Have so many pages and, if that can be, twice as many as before."""
        if pages > self.most_pages and self.offload is None:
            return  # the step raises, and takes nothing for that
        try:
            self.grow(core, max(pages, 2 * core.num_pages))
        except OutOfPages:
            try:
                self.grow(core, pages)
            except OutOfPages:
                if self.offload is None:
                    raise

    def grow(self, core: _core.ThreadTable, pages: int) -> None:
        """Have so many pages, or the most; nothing is done where there are as many.

        Pools grow one by one, so that one layer is there twice. Larger ones than the core knows
        serve it as well: whatever comes between, the session can be used on. Raises OutOfPages.
        """
        pages = min(pages, self.most_pages)
        if pages <= core.num_pages:
            return
        self.arena.follow([])  # it holds pools too; without it pages are touched when they are used
        self.grown += 1
        for i, pool in enumerate(self.pools):
            if pool.num_pages < pages:
                self.pools[i] = self._larger(i, pool, pages)
        core.grow(pages)
        self.arena.follow(self.pools)

    def _larger(self, layer: int, pool: Pool, pages: int) -> Pool:
        assert self.spec is not None
        try:
            larger = self.spec.make_pool(layer, pages, self._page_size)
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
        self.arena.keep_ahead(core.peak_pages, core.num_threads)

    def close(self) -> None:
        """Let the pools go."""
        self.pools, self.offload = [], None
        self.arena.close()
