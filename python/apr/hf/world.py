"""The processes that torchrun started: all run one command, and the first one tells."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def num_ranks() -> int:
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    return num_ranks() == 1 or dist.get_rank() == 0


def same_everywhere(value: Any) -> Any:
    """The first rank's value, on all of them; plain data."""
    if num_ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def joined_ranks() -> Iterator[None]:
    """Join the processes that torchrun started; what others than the first one print is lost."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group()
    try:
        with contextlib.ExitStack() as quiet:
            if not is_first_rank():
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    finally:
        dist.destroy_process_group()
