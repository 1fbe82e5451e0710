"""The seam with transformers: one attention and one mask function, and which forward is running."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "apr"


class Forward(Protocol):
    """What handles the attention and mask calls of a running forward.

    owner: ids of the modules and configurations whose calls these are; all others go to stock SDPA.
    """

    owner: frozenset[int]

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any
    ) -> Tensor: ...

    def mask(self, *args: Any, **kwargs: Any) -> Any: ...


# The only global besides the registration below: which forward of ours is running, if any.
_RUNNING: ContextVar[Forward | None] = ContextVar("apr_forward", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    running = _RUNNING.get()
    if running is None or id(module) not in running.owner:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return running.attend(module, query, key, value, attention_mask, scale, kwargs), None


def _mask(*args: Any, **kwargs: Any) -> Any:
    running, config = _RUNNING.get(), kwargs.get("config")
    if running is None or (config is not None and id(config) not in running.owner):
        return sdpa_mask(*args, **kwargs)
    return running.mask(*args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def start_running(forward: Forward) -> None:
    """Route the attention calls of this context to `forward`, until `stop_running`."""
    _RUNNING.set(forward)


def stop_running(forward: Forward) -> None:
    """End `forward`, if it is still the one that runs."""
    if _RUNNING.get() is forward:
        _RUNNING.set(None)


@contextlib.contextmanager
def running(forward: Forward) -> Iterator[None]:
    """Route the attention calls of a block to `forward`."""
    start_running(forward)
    try:
        yield
    finally:
        stop_running(forward)


def members(model: Any) -> frozenset[int]:
    """Ids of a model's modules and of their configurations."""
    found = {id(module) for module in model.modules()}
    found |= {id(m.config) for m in model.modules() if hasattr(m, "config")}
    return frozenset(found)
