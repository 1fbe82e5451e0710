"""What goes wrong on purpose: in the model, in the logits, in a processor, and signals."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor


class Injected(Exception):
    """A fault of a model's own code."""


class Signalled(KeyboardInterrupt):
    """A signal of ours, and not the user's own."""


def _raise(error: type[BaseException]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error("on purpose")

    return hook


def _poison(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
    return torch.full_like(out, torch.nan)


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _signalled(delay: float) -> Iterator[None]:
    """A signal after `delay` seconds, if it is not over by then."""
    armed, graded = True, torch.is_grad_enabled()

    def strike(*_: Any) -> None:
        if armed:
            raise Signalled

    former = signal.signal(signal.SIGALRM, strike)
    noted, sys.unraisablehook = sys.unraisablehook, lambda _: None  # one that strikes a destructor
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.set_grad_enabled(graded)  # it may have struck torch's own exit of no_grad
        signal.signal(signal.SIGALRM, former)
        sys.unraisablehook = noted


# What can be asked of a step; a signal can come anywhere else too.
KINDS = ["before attention", "after attention", "interrupt", "nan"]
if hasattr(signal, "setitimer"):
    KINDS += ["signal"] * 3


def fault(model: Any, kind: str, number: int) -> Any:
    """A context in which it comes; `number` says where, or when."""
    layer = model.model.layers[number % len(model.model.layers)]
    if kind == "before attention":
        return _hooked(layer.self_attn.register_forward_pre_hook(_raise(Injected)))
    if kind == "after attention":
        return _hooked(layer.self_attn.o_proj.register_forward_pre_hook(_raise(Injected)))
    if kind == "interrupt":
        return _hooked(layer.mlp.register_forward_hook(_raise(Signalled)))
    if kind == "nan":
        return _hooked(model.lm_head.register_forward_hook(_poison))
    return _signalled(1e-6 * (1 + number % 4000))


class Tears:
    """A streamer that fails at the n-th token of a run."""

    def __init__(self, n: int) -> None:
        self._left = n

    def put(self, value: torch.Tensor) -> None:
        """A prompt, or the next token."""
        if value.ndim == 1 and value.numel() == 1:
            self._left -= 1
        if self._left == 0:
            raise Injected("on purpose")

    def end(self) -> None:
        """Nothing."""


class Breaks(LogitsProcessor):  # type: ignore[misc]
    """A processor that fails in its n-th call."""

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left == 0:
            raise Injected("on purpose")
        return scores
