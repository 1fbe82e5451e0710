"""Pages of a KV pool: their size, and how many of them a session has."""

from __future__ import annotations

import os

import torch

from apr.errors import InvalidInput

PAGE_SIZE = 64  # tokens

# Without max_tokens a pool takes this part of the free memory, and at most so many tokens. On the
# CPU pages cost nothing before their use is near: memory is reserved, and touched a little ahead
# (arena.py).
_FREE_MEMORY_SHARE = 0.25
_MOST_TOKENS = 1 << 22


def check_page_size(page_size: int) -> None:
    """Raise InvalidInput for a page that sessions and GPU kernels do not take."""
    if page_size < 16 or page_size & (page_size - 1):
        raise InvalidInput(f"page_size: got {page_size}; expected a power of two from 16 on")


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def pages_for(
    max_tokens: int | None, bytes_per_token: int, page_size: int, device: torch.device
) -> int:
    """Pages for so many tokens, or, with None, for a part of the device's free memory."""
    if max_tokens is None:
        fitting = int(_free_memory(device) * _FREE_MEMORY_SHARE) // max(bytes_per_token, 1)
        max_tokens = max(page_size, min(fitting, _MOST_TOKENS))
    return -(-max_tokens // page_size)
