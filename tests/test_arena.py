"""Pages are present before they are handed out, and close, errors and small pools do not disturb
it.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

import apr
from apr import ops
from apr.ops.arena import Arena


def present(pool: ops.Pool, page: int) -> bool:
    """Whether the operating system has given all memory of one page: mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for side in (pool.k, pool.v):
        size = side[0].numel() * side.element_size()
        first = (side.data_ptr() + page * size) // mmap.PAGESIZE * mmap.PAGESIZE
        length = side.data_ptr() + (page + 1) * size - first
        flags = (ctypes.c_ubyte * (-(-length // mmap.PAGESIZE)))()
        assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), flags) == 0
        if not all(flag & 1 for flag in flags):
            return False
    return True


def big_pool(pages: int = 4096) -> ops.Pool:
    """Pages of 512 KiB, so that one page's memory does not come with another's (huge pages are 2
    MiB).
    """
    return ops.empty_pool(pages, 4, 512, torch.float32)


def test_pages_are_present_before_they_are_used():
    pool = big_pool()
    arena = Arena([pool])
    assert not present(pool, 100)
    arena.keep_ahead(used=0, threads=1)
    arena.wait()
    assert all(present(pool, page) for page in range(64))
    assert not present(pool, 100)  # negative control: memory is not taken long before its use
    arena.keep_ahead(used=40, threads=1)
    arena.wait()
    assert all(present(pool, page) for page in range(104))
    assert not present(pool, 120)
    arena.close()


def test_wide_sessions_have_two_pages_a_thread():
    pool = big_pool()
    arena = Arena([pool])
    arena.keep_ahead(used=10, threads=100)
    arena.wait()
    assert present(pool, 209)
    assert not present(pool, 220)
    arena.close()


def test_populate_changes_nothing():
    pool = big_pool(64)
    pool.k.fill_(3.0)
    pool.populate(0, 64)
    assert bool((pool.k == 3.0).all())


def test_small_pools_end_where_they_end():
    pool = ops.empty_pool(3, 1, 8, torch.float32)
    arena = Arena([pool])
    for used in (0, 2, 3):
        arena.keep_ahead(used, threads=50)
        arena.wait()
    arena.close()
    arena.close()


def test_a_session_keeps_its_pages_ahead(llama, monkeypatch):
    touched: list[tuple[int, int]] = []
    monkeypatch.setattr(ops.Pool, "populate", lambda self, first, end: touched.append((first, end)))
    with apr.Session(llama, max_tokens=64 * 600, self_test=False) as s:
        s.memory.arena.wait()
        assert touched == [(0, 64)] * len(s.pools)
        kids = s.thread([1, 2, 3]).fork(70)
        s.step(kids)
        used = s.stats.peak_pages
        for kid in kids:
            kid.extend([4])
        s.step(kids)
        s.memory.arena.wait()
        assert max(end for _, end in touched) >= used + 71  # a page for each thread


def test_a_closed_session_lets_its_memory_go(llama):
    with apr.Session(llama, max_tokens=640) as s:
        arena = weakref.ref(s.pools[0].k)
        assert arena() is not None
    assert arena() is None


def test_without_a_thread_pages_are_touched_when_they_are_used(llama, monkeypatch):
    def refuse(self: ThreadPoolExecutor, *arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    with apr.Session(llama, max_tokens=640) as s:
        assert s.step([s.thread([1, 2, 3])]).isfinite().all()


STRUCK = """
import threading

import torch

from apr import ops
from apr.ops.arena import Arena

wait = threading.Event.wait


def strike(event, timeout=None):
    threading.Event.wait = wait
    event.wait(timeout)
    raise KeyboardInterrupt


arena = Arena([ops.empty_pool(64, 1, 16, torch.float32)])
threading.Event.wait = strike
try:
    arena.keep_ahead(0, 1)
except KeyboardInterrupt:
    print("struck")
"""


def test_an_interrupt_as_the_thread_begins_lets_python_end():
    """Where it began, and its starter does not know: a pool of workers would wait for ever."""
    ran = subprocess.run(
        [sys.executable, "-c", STRUCK], capture_output=True, text=True, timeout=120, check=True
    )
    assert ran.stdout == "struck\n"
