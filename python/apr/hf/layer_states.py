"""Measures what a model keeps besides keys and values: the states of recurrent layers, or, where
its attention is its own, everything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from apr.hf.cache_rows import leaves, rebuild
from apr.hf.interface import OF_THE_MACHINE, input_device

_ROWS = 5  # of the forwards that measure; no cache has so many parts of another kind

# From one state on, several tokens at once and one by one: what a model that goes on rightly may
# differ by, as a part of what the whole past is worth. In float32 2e-5 was seen, and 3e-3 where it
# went wrong; in bfloat16 0.014, and 0.045.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
_SAME_HALF = 0.03


@dataclass(frozen=True)
class StateSpec:
    """How a model's own cache is kept for threads, a row each."""

    argument: str  # of the forward that takes the cache, and of its output that returns it
    attends: bool  # attention runs by the plan; else its keys and values are part of the row
    starts_empty: bool  # a cache that holds nothing can be given to a first forward
    changed: frozenset[int]  # tensors of a row that a forward writes into
    one_token: bool  # from a state on, only single tokens give what the text as a whole gives
    # Why attention does not run by the plan.
    reason: str = field(default="", compare=False)
    chooses: bool = False  # a sparse index says which keys attention sees


class _Elsewhere:
    """A layer whose keys and values the attention function stores."""

    keys: Tensor | None
    values: Tensor | None
    cumulative_length: int

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return keys, values

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class _Assigned:
    """A layer that takes a new recurrent state as it is, instead of copying it into the former."""

    recurrent_states: dict[int, Tensor]
    is_recurrent_states_initialized: dict[int, bool]

    def update_recurrent_state(self, states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.recurrent_states[state_idx] = states
        self.is_recurrent_states_initialized[state_idx] = True
        return states


@functools.cache
def _ours(layer: Any, attends: bool) -> Any:
    bases: tuple[type, ...] = ()
    if issubclass(layer, LinearAttentionLayer):
        bases += (_Assigned,)
    if attends and issubclass(layer, CacheLayerMixin):
        bases += (_Elsewhere,)
    if not bases:
        return layer
    # Some layer classes register what is derived from them; ours are nobody's default.
    names = {"__module__": __name__, "_layer_type": None}
    return type(f"_{layer.__name__}", (*bases, layer), names)


def adopt(cache: Any, attends: bool) -> Any:
    """A cache of the model's, made ours: with `attends` it holds no keys and values."""
    if not isinstance(cache, Cache):
        return cache
    for part in vars(cache).values():  # a cache of an encoder and a decoder has two in it
        adopt(part, attends)
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(layer, (_Assigned, _Elsewhere)):
            continue
        former: Any = type(layer)
        kind: Any = _ours(former, attends)
        cache.layers[i] = ours = kind.__new__(kind)
        vars(ours).update(vars(layer))
        if isinstance(ours, _Elsewhere):
            ours.keys = ours.values = None
            if hasattr(ours, "cumulative_length"):
                ours.cumulative_length = 0
    return cache


def empty_cache(model: Any, spec: StateSpec) -> Any:
    """A cache that holds nothing, for a first forward."""
    return adopt(DynamicCache(config=model.config), spec.attends)


def lend(cache: Any, spec: StateSpec) -> Any:
    """A cache for a forward to go on from; the one that is given stays as it is."""
    at = iter(range(len(leaves(cache))))
    return rebuild(cache, lambda x: x.clone() if next(at) in spec.changed else x)


def run(model: Any, spec: StateSpec, cache: Any, ids: Tensor, **more: Any) -> tuple[Tensor, Any]:
    """A forward of rows ids [n, L] that go on from the rows of a cache, or (None) begin.

    Returns its logits and the cache after it; the one that was given stays as it was.
    """
    if cache is not None:
        more[spec.argument] = lend(cache, spec)
    elif spec.starts_empty:
        more[spec.argument] = empty_cache(model, spec)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, **more)
    return out.logits, adopt(out[spec.argument], spec.attends)


def find_cache(model: Any) -> tuple[str, Any] | None:
    """The name and value of the cache that a model returns, found by a forward of `_ROWS` rows."""
    with torch.no_grad():
        out = model(input_ids=_ids(model, 5), use_cache=True)
    for name in inspect.signature(model.forward).parameters:
        found = out.get(name) if isinstance(out, dict) else None
        if found is not None and leaves(found):
            return name, found
    return None


def has_states(cache: Any) -> bool:
    """Whether a cache holds more than the keys and values of attention."""
    return bool(leaves(adopt(rebuild(cache, lambda x: x), attends=True)))


def has_attention(cache: Any) -> bool:
    """Whether a cache may hold keys and values."""
    layers = getattr(cache, "layers", None)
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def measure_states(
    model: Any, name: str, cache: Any, attends: bool, refuse: Callable[[str], Exception], why: str
) -> StateSpec:
    """How rows of a cache that a forward of `_ROWS` rows returned can be kept; raises what `refuse`
    makes of a reason.
    """
    if any(x.shape[0] != _ROWS for x in leaves(cache)):
        raise refuse("its cache holds tensors that are not rows of its sequences")
    for layer in getattr(cache, "layers", ()):
        if type(layer).__module__ != CacheLayerMixin.__module__:
            raise refuse(f"its cache has layers of its own kind ({type(layer).__name__})")
    spec = StateSpec(name, attends, type(cache) is DynamicCache, frozenset(), False, why)
    spec = replace(spec, one_token=_one_token(model, replace(spec, attends=False), cache, attends))
    return replace(spec, changed=_changed(model, spec, cache))


def _changed(model: Any, spec: StateSpec, cache: Any) -> frozenset[int]:
    """Which tensors of a cache forwards of one token, and of more, write into."""
    found: set[int] = set()
    for length in (1,) if spec.one_token else (1, 3):
        given = adopt(rebuild(cache, torch.clone), spec.attends)
        stood = [x.clone() for x in leaves(given)]
        run(model, spec, given, _ids(model, length))
        found |= {
            i
            for i, (x, y) in enumerate(zip(leaves(given), stood, strict=True))
            if not torch.equal(x, y)
        }
    return frozenset(found)


def _one_token(model: Any, spec: StateSpec, cache: Any, attends: bool) -> bool:
    """Whether several tokens behind a cache are answered otherwise than the same one by one.

    Formats differ in how much the two are off by rounding. So they are held against what is at
    stake: the whole past, and each part of the cache, which given to another row must move both
    alike; code that leaves a state out where it is given several tokens is not moved by it.
    """
    ids = _ids(model, 2)

    def last(start: Any, step: int) -> Tensor:
        now = start if start is None else adopt(rebuild(start, torch.clone), attends=False)
        for i in range(0, ids.shape[1], step):
            # What a forward writes into is nobody's here.
            out, now = run(model, spec, now, ids[:, i : i + step])
        return out[:, -1].float()

    def apart(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().mean())

    singly = last(cache, 1)
    try:
        together = last(cache, 2)
    except OF_THE_MACHINE:
        raise
    except Exception:  # whatever a model's own code says of several tokens behind a cache
        return True
    allowed = _SAME.get(model.get_input_embeddings().weight.dtype, _SAME_HALF)
    if not apart(together, singly) <= allowed * apart(last(None, 2), singly):
        return True
    # Of the keys and values of attention that runs by the plan nothing is kept in the cache.
    kept = leaves(adopt(rebuild(cache, lambda x: x), attends))
    for part in {(x.shape[1:], x.dtype) for x in kept}:

        def moved(x: Tensor, part: Any = part) -> Tensor:
            return x.roll(1, 0) if (x.shape[1:], x.dtype) == part else x

        other = rebuild(cache, moved)
        if apart(last(other, 2), together) < apart(last(other, 1), singly) / 4:
            return True
    return False


def _ids(model: Any, length: int) -> Tensor:
    line = torch.arange(_ROWS * length, device=input_device(model)).view(_ROWS, length) * 5 + 3
    vocab_size: int = model.get_input_embeddings().weight.shape[0]
    return line % vocab_size
