"""Pages of a KV pool: their size, and how many of them a session has."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from apr.errors import InvalidInput

PAGE_SIZE = 64  # tokens

# Without max_tokens a pool takes this part of the free memory, and at most so many tokens. On the
# CPU pages cost nothing before their use is near: memory is reserved, and touched a little ahead
# (arena.py).
_FREE_MEMORY_SHARE = 0.25
_MOST_TOKENS = 1 << 22


def check_page_size(page_size: Any) -> None:
    """Raise InvalidInput for a page that sessions and GPU kernels do not take."""
    if not isinstance(page_size, Integral) or page_size < 16 or page_size & (page_size - 1):
        raise InvalidInput(f"page_size: got {page_size}; expected a power of two from 16 on")


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    page = os.sysconf("SC_PAGE_SIZE")
    free = [os.sysconf("SC_AVPHYS_PAGES") * page, *_left_of_cgroup()]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - int(_read("/proc/self/statm", "0").split()[0]) * page)
    return max(min(free), 0)


def _read(path: str, otherwise: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return otherwise


def _left_of_cgroup() -> list[int]:
    """What a container may still take, in version 2 or 1 of control groups; files in memory that it
    would give back count as free.
    """
    own = next((x[3:] for x in _read("/proc/self/cgroup", "").split() if x[:3] == "0::"), "")
    for folder, most, used in (
        ("/sys/fs/cgroup" + own, "memory.max", "memory.current"),
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = _read(f"{folder}/{most}", "").strip()
        if limit.isdecimal():
            stat = dict(x.split()[:2] for x in _read(f"{folder}/memory.stat", "").splitlines())
            taken = int(_read(f"{folder}/{used}", "0")) - int(stat.get("inactive_file", 0))
            return [int(limit) - taken]
    return []


def pages_for(
    max_tokens: int | None, bytes_per_token: Mapping[torch.device, int], page_size: int
) -> int:
    """Pages for so many tokens, or, with None, for a part of the free memory of the device that has
    least for the bytes that a token takes there.
    """
    if max_tokens is None:
        fitting = min(
            int(_free_memory(device) * _FREE_MEMORY_SHARE) // max(size, 1)
            for device, size in bytes_per_token.items()
        )
        max_tokens = max(page_size, min(fitting, _MOST_TOKENS))
    return -(-max_tokens // page_size)
